"""Import the modules of a package when one of their names is first used"""

import importlib
import sys
from typing import Any, Callable, Dict, List, Tuple


def lazy_names(
    package: str, modules: Dict[str, Tuple[str, ...]]
) -> Tuple[Callable[[str], Any], Callable[[], List[str]]]:
    """Create `__getattr__` and `__dir__` of a package, which Python calls for names that the package does not have yet.

    Args:
        package: Name of the package.
        modules: Names that the package offers, by the module that has them.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name in module_of:
            return getattr(importlib.import_module(f'{package}.{module_of[name]}'), name)
        if name in modules:
            return importlib.import_module(f'{package}.{name}')
        raise AttributeError(f'module {package!r} has no attribute {name!r}')

    def __dir__() -> List[str]:
        return sorted({*vars(sys.modules[package]), *module_of, *modules})

    return __getattr__, __dir__
