"""A plugin of mypy that notes which keys of the configuration are read: ``CLASS.FIELD``, one a line, in $KEYS_READ."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mypy.plugin import AttributeContext, Plugin
from mypy.types import Type

PACKAGE = "lisa_dist.config."


class KeysRead(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        if not fullname.startswith(PACKAGE):
            return None
        class_name, _, field = fullname.rpartition(".")

        def note(context: AttributeContext) -> Type:
            checker: Any = context.api
            function = checker.scope.top_level_function()
            # Not what a dataclass declares, nor what it checks of itself, nor what is only set.
            if function is not None and function.name != "__post_init__" and not context.is_lvalue:
                with Path(os.environ["KEYS_READ"]).open("a") as file:
                    file.write(f"{class_name.rpartition('.')[2]}.{field}\n")
            return context.default_attr_type

        return note


def plugin(version: str) -> type[Plugin]:
    return KeysRead
