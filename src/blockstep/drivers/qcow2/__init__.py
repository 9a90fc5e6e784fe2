"""Driver ``qcow2``: the image format of QEMU. `driver` is the node, `format` says what the bytes mean."""

from blockstep.drivers.qcow2.driver import Qcow2, Qcow2Options

__all__ = ["Qcow2", "Qcow2Options"]
