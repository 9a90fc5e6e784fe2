"""The numbers of the NBD protocol, under the protocol document's names without their ``NBD_``.

Source: ``doc/proto.md`` of NetworkBlockDevice/nbd, and its branch ``extension-ext-header`` for extended
headers. All are plain ints: they are compared and packed on the path of every request.
"""

from __future__ import annotations

from typing import Final

DEFAULT_PORT: Final = 10809

# Magic numbers.
INIT_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
OLDSTYLE_MAGIC: Final = 0x00420281861253
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

# Handshake flags: the server's, and the client's answer.
FLAG_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_NO_ZEROES: Final = 1 << 1
FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_C_NO_ZEROES: Final = 1 << 1

# Transmission flags.
FLAG_HAS_FLAGS: Final = 1 << 0
FLAG_READ_ONLY: Final = 1 << 1
FLAG_SEND_FLUSH: Final = 1 << 2
FLAG_SEND_FUA: Final = 1 << 3
FLAG_ROTATIONAL: Final = 1 << 4
FLAG_SEND_TRIM: Final = 1 << 5
FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
FLAG_SEND_DF: Final = 1 << 7
FLAG_CAN_MULTI_CONN: Final = 1 << 8
FLAG_SEND_RESIZE: Final = 1 << 9
FLAG_SEND_CACHE: Final = 1 << 10
FLAG_SEND_FAST_ZERO: Final = 1 << 11
FLAG_BLOCK_STATUS_PAYLOAD: Final = 1 << 12

# Options.
OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_PEEK_EXPORT: Final = 4
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10
OPT_EXTENDED_HEADERS: Final = 11

# Option replies. Errors have bit 31.
REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_FLAG_ERROR: Final = 1 << 31
REP_ERR_UNSUP: Final = REP_FLAG_ERROR | 1
REP_ERR_POLICY: Final = REP_FLAG_ERROR | 2
REP_ERR_INVALID: Final = REP_FLAG_ERROR | 3
REP_ERR_PLATFORM: Final = REP_FLAG_ERROR | 4
REP_ERR_TLS_REQD: Final = REP_FLAG_ERROR | 5
REP_ERR_UNKNOWN: Final = REP_FLAG_ERROR | 6
REP_ERR_SHUTDOWN: Final = REP_FLAG_ERROR | 7
REP_ERR_BLOCK_SIZE_REQD: Final = REP_FLAG_ERROR | 8
REP_ERR_TOO_BIG: Final = REP_FLAG_ERROR | 9
REP_ERR_EXT_HEADER_REQD: Final = REP_FLAG_ERROR | 10

# Kinds of REP_INFO.
INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3

# Commands.
CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7

# Command flags.
CMD_FLAG_FUA: Final = 1 << 0
CMD_FLAG_NO_HOLE: Final = 1 << 1
CMD_FLAG_DF: Final = 1 << 2
CMD_FLAG_REQ_ONE: Final = 1 << 3
CMD_FLAG_FAST_ZERO: Final = 1 << 4
CMD_FLAG_PAYLOAD_LEN: Final = 1 << 5

# Reply chunks. Errors have bit 15.
REPLY_FLAG_DONE: Final = 1 << 0
REPLY_TYPE_NONE: Final = 0
REPLY_TYPE_OFFSET_DATA: Final = 1
REPLY_TYPE_OFFSET_HOLE: Final = 2
REPLY_TYPE_BLOCK_STATUS: Final = 5
REPLY_TYPE_BLOCK_STATUS_EXT: Final = 6
REPLY_TYPE_FLAG_ERROR: Final = 1 << 15
REPLY_TYPE_ERROR: Final = REPLY_TYPE_FLAG_ERROR | 1
REPLY_TYPE_ERROR_OFFSET: Final = REPLY_TYPE_FLAG_ERROR | 2

# Errors. Linux's errno numbers, but fixed by the protocol on every system.
EPERM: Final = 1
EIO: Final = 5
ENOMEM: Final = 12
EINVAL: Final = 22
ENOSPC: Final = 28
EOVERFLOW: Final = 75
ENOTSUP: Final = 95
ESHUTDOWN: Final = 108

# Metadata contexts and the flags of their extents.
BASE_ALLOCATION: Final = "base:allocation"
QEMU_ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
QEMU_DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"  # followed by the bitmap's name
STATE_HOLE: Final = 1 << 0
STATE_ZERO: Final = 1 << 1
STATE_DIRTY: Final = 1 << 0

# Sizes in bytes.
MAX_STRING: Final = 4096  # longest string of the protocol: export name, query, message
MAX_PAYLOAD: Final = 32 << 20  # what a peer may send without having asked: the protocol's default
REQUEST_SIZE: Final = 28
EXTENDED_REQUEST_SIZE: Final = 32
SIMPLE_REPLY_SIZE: Final = 16
STRUCTURED_REPLY_SIZE: Final = 20
EXTENDED_REPLY_SIZE: Final = 32
OPTION_HEADER_SIZE: Final = 16
OPTION_REPLY_HEADER_SIZE: Final = 20
