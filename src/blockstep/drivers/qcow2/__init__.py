"""Driver ``qcow2``: the image format of QEMU. `driver` is the node, `format` what the bytes mean."""
