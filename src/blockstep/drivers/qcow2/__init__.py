"""Driver ``qcow2``: the image format of QEMU. `driver` is the node, `format` says what the bytes mean."""
