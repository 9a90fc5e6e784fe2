"""A QMP shell: lines of words become commands, and Tab knows what may come next.

    catalogue   what a server offers: its query-qmp-schema, looked up by name
    words       a line -> command and arguments
    complete    a line up to the cursor -> what may come next
    session     the terminal: prompt, history, events between the lines

The first three are pure: they see neither a terminal nor a socket. Nothing is built in about any command, so the
shell knows of every server what that server tells about itself: QEMU as well as blockstep.
"""
