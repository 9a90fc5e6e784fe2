"""What the options of commands are written with: `Annotated` and `Literal`, without the import of `typing`.

To mypy they are those of `typing`. When a program runs they keep what they were given, as ``list[int]`` does, in
``__origin__`` and ``__args__``, and that is all that `blockstep.cli.words` needs to read a command line. Annotations
that others read, as msgspec those of its structs, are written with those of `typing`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Annotated, Literal
else:
    from types import GenericAlias

    class Annotated:
        """``Annotated[kind, info]``"""

        __class_getitem__ = classmethod(GenericAlias)

    class Literal:
        """``Literal[value, value]``"""

        __class_getitem__ = classmethod(GenericAlias)


__all__ = ["Annotated", "Literal"]
