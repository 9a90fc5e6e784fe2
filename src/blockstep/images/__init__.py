"""Images as files on their own: what ``blockstep img`` does, without a terminal.

    ImageName ──opened──► Backend ──► describe │ mapping │ compare │ convert │ resize │ ...
    (file, format)        a graph of its own, for one command

Every command opens its images as nodes, so what has a driver is an image format here as well: the table is
`blockstep.images.opened.FORMATS`. The format is what the user says it is. An image's content decides only where it
was asked for (``auto``): whoever can write to a raw disk, its guest for one, could otherwise make it look like an
image of another format, with a backing file of its choice.

A file that is made comes under its name when it is complete (`blockstep.images.files`).
"""
