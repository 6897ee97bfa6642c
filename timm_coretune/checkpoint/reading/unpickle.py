"""Read a pickle into plain data, without importing or calling anything that it names

A pickle is a program: it names classes and functions and has them called. Here a name stays a text. What the names of
REBUILDERS stand for, tensors, arrays and dictionaries, is rebuilt by functions of this package, from numbers that are
checked. All else becomes a `Placeholder`, which takes whatever it is given and does nothing.
"""

import pickletools
from collections import Counter
from typing import Any, BinaryIO, Callable, Dict, List, NamedTuple, Tuple

from .limits import MAX_OPERATIONS, MAX_TENSORS

Storage = Any  # what a reader of files gives for a storage that the pickle names

# top-level modules and functions that only a pickle names which is to run commands
_COMMANDS = ('os', 'posix', 'nt', 'subprocess', 'pty', 'runpy', 'importlib', 'ctypes', 'socket', 'shutil', 'sys')
_COMMAND_BUILTINS = ('eval', 'exec', 'execfile', 'compile', 'open', 'file', '__import__', 'breakpoint', 'input')
_MODULES = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}  # names in Python 2
# plain data that is of no interest, and is left out without being counted
_UNCOUNTED = frozenset((
    'builtins.set', 'builtins.frozenset', 'builtins.list', 'builtins.tuple', 'builtins.complex', 'builtins.slice',
    'builtins.range', 'builtins.bytearray', 'builtins.int', 'builtins.float', 'numpy._core.multiarray.scalar',
    'torch.Size',
))  # fmt: skip


class CommandError(ValueError):
    """A pickle names a function that runs commands."""


class Name:
    """A class or function that a pickle names. It is not imported."""

    __slots__ = ('text',)

    def __init__(self, text: str) -> None:
        self.text = text


class Placeholder:
    """An object of a class that was not imported.

    Attributes:
        name: Module and name of the class.
        items: What the object holds by key, if it was made from a dictionary or filled like one.
    """

    __slots__ = ('name', 'items')

    def __init__(self, name: str, items: Any = None) -> None:
        self.name = name
        self.items: Dict[str, Any] = {} if items is None else items


class Rebuilt:
    """An object that a pickle first makes and then gives its state. `build` takes the state."""

    def build(self, state: Any) -> None:
        raise NotImplementedError


class StorageId(NamedTuple):
    """What a pickle of torch.save says about a storage.

    Attributes:
        kind: Name of the class of the storage, such as torch.FloatStorage.
        key: Name of the storage in the file.
        length: Number of its elements.
        view: Offset and number of elements of the part that is meant, in files of old versions of torch.
    """

    kind: str
    key: str
    length: int
    view: Tuple[int, int]


Rebuilder = Callable[['Unpickler', Tuple[Any, ...]], Any]


class Unpickler:
    """Runs a pickle on a stack, as pickle.Unpickler does.

    Args:
        file: The file, at the start of the pickle. Reading must not return more than the file has.
        size: Bytes of the file. What the pickle makes by copying may be four times as much.
        rebuilders: Functions for the names that are rebuilt, called with this object and the arguments in the pickle.
        load_storage: Returns the storage of an id.
    """

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        rebuilders: Dict[str, Rebuilder],
        load_storage: Callable[[StorageId], Storage],
    ) -> None:
        self.file = file
        self.left = 4 * size  # bytes may be copied from a text, and from there to a storage
        self.rebuilders = rebuilders
        self.load_storage = load_storage
        self.left_out: Counter = Counter()  # objects that became placeholders, by class
        self.tensors = 0
        self._stack: List[Any] = []
        self._marks: List[List[Any]] = []  # stacks below the marks
        self._memo: Dict[int, Any] = {}

    def load(self) -> Any:
        """Run the pickle up to its end, and return what it makes.

        Raises:
            CommandError: The pickle names a function that runs commands.
            Exception: The pickle is damaged. Which one, depends on where.
        """
        self._stack, self._marks, self._memo = [], [], {}
        for number, (opcode, argument, _) in enumerate(pickletools.genops(self.file)):
            if number > MAX_OPERATIONS:
                raise ValueError(f'a pickle of more than {MAX_OPERATIONS} operations')
            name = opcode.name
            if name in _PUSHES:
                self._stack.append(argument)
            else:
                _OPERATIONS[name](self, argument)
        return self._stack.pop()

    def spend(self, amount: int) -> None:
        """Count what is copied. A pickle that copies more than it holds repeats itself to fill the memory."""
        self.left -= amount
        if self.left < 0:
            raise ValueError('a pickle that copies its content over and over')

    def count_tensor(self) -> None:
        self.tensors += 1
        if self.tensors > 2 * MAX_TENSORS:  # of the optimizer too, which are not searched
            raise ValueError(f'a pickle of more than {2 * MAX_TENSORS} tensors')

    def construct(self, made_of: Any, args: Any) -> Any:
        """What a class or function makes of its arguments, a placeholder if it is no name of the table."""
        if not isinstance(made_of, Name):
            return Placeholder(made_of.name if isinstance(made_of, Placeholder) else type(made_of).__name__)
        rebuild = self.rebuilders.get(made_of.text)
        if rebuild is not None and isinstance(args, tuple):
            return rebuild(self, args)
        if isinstance(args, tuple) and len(args) == 1 and isinstance(args[0], dict):
            return Placeholder(made_of.text, args[0])
        return self.placeholder(made_of.text)

    def placeholder(self, name: str) -> Placeholder:
        """Make a placeholder, and count it."""
        if name not in _UNCOUNTED:
            self.left_out[name] += 1
        return Placeholder(name)

    def set_items(self, target: Any, pairs: List[Any]) -> None:
        """Fill a dictionary from keys and values in turn. Only texts are searched, so other keys are left out."""
        if isinstance(target, Placeholder):
            if not target.items and target.name not in _UNCOUNTED:
                self.left_out[target.name] -= 1  # it is read as a dictionary
            target = target.items
        if not isinstance(target, dict):
            raise ValueError(f'a pickle that fills a {type(target).__name__} like a dictionary')
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if isinstance(key, str):
                target[key] = value
            elif isinstance(key, (Name, Placeholder)):
                self.left_out[key.text if isinstance(key, Name) else key.name] += 1

    def _push(self, value: Any) -> None:
        self._stack.append(value)  # the stack of now: taking what is above a mark exchanges it

    def _pop(self, count: int) -> Tuple[Any, ...]:
        """Take the top of the stack."""
        if len(self._stack) < count:
            raise ValueError('a pickle that takes more from its stack than there is')
        taken = tuple(self._stack[-count:])
        del self._stack[-count:]
        return taken

    def _pop_mark(self) -> List[Any]:
        """Take everything above the last mark."""
        taken, self._stack = self._stack, self._marks.pop()
        return taken

    def _name(self, module: str, name: str) -> None:
        module = _MODULES.get(module, module).replace('numpy.core.', 'numpy._core.')
        if module.partition('.')[0] in _COMMANDS or (module == 'builtins' and name in _COMMAND_BUILTINS):
            raise CommandError(f'{module}.{name}')
        self._push(Name(f'{module}.{name}'))

    # operations, by the names that pickletools gives them

    def _none(self, argument: Any) -> None:
        self._push(None)

    def _true(self, argument: Any) -> None:
        self._push(True)

    def _false(self, argument: Any) -> None:
        self._push(False)

    def _empty_tuple(self, argument: Any) -> None:
        self._push(())

    def _empty_list(self, argument: Any) -> None:
        self._push([])

    def _empty_dict(self, argument: Any) -> None:
        self._push({})

    def _empty_set(self, argument: Any) -> None:
        self._push(Placeholder('builtins.set'))

    def _frozenset(self, argument: Any) -> None:
        self._pop_mark()
        self._push(Placeholder('builtins.frozenset'))

    def _mark(self, argument: Any) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _tuple(self, argument: Any) -> None:
        self._push(tuple(self._pop_mark()))

    def _tuple1(self, argument: Any) -> None:
        self._push(self._pop(1))

    def _tuple2(self, argument: Any) -> None:
        self._push(self._pop(2))

    def _tuple3(self, argument: Any) -> None:
        self._push(self._pop(3))

    def _list(self, argument: Any) -> None:
        self._push(self._pop_mark())

    def _dict(self, argument: Any) -> None:
        pairs = self._pop_mark()
        self._push({})
        self.set_items(self._stack[-1], pairs)

    def _extend(self, items: Any) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Placeholder):
            raise ValueError(f'a pickle that appends to a {type(target).__name__}')

    def _append(self, argument: Any) -> None:
        self._extend(self._pop(1))

    def _appends(self, argument: Any) -> None:
        self._extend(self._pop_mark())

    def _set_item(self, argument: Any) -> None:
        pairs = self._pop(2)
        self.set_items(self._stack[-1], list(pairs))

    def _set_items(self, argument: Any) -> None:
        pairs = self._pop_mark()
        self.set_items(self._stack[-1], pairs)

    def _pop_one(self, argument: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _pop_to_mark(self, argument: Any) -> None:
        self._pop_mark()

    def _dup(self, argument: Any) -> None:
        self._push(self._stack[-1])

    def _put(self, argument: Any) -> None:
        self._memo[argument] = self._stack[-1]

    def _memoize(self, argument: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, argument: Any) -> None:
        self._push(self._memo[argument])

    def _global(self, argument: Any) -> None:
        module, _, name = argument.rpartition(' ')
        self._name(module, name)

    def _stack_global(self, argument: Any) -> None:
        module, name = self._pop(2)
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError('a pickle that names a class by something else than text')
        self._name(module, name)

    def _reduce(self, argument: Any) -> None:
        self._push(self.construct(*self._pop(2)))

    def _new_object_ex(self, argument: Any) -> None:
        made_of, args, _ = self._pop(3)
        self._push(self.construct(made_of, args))

    def _inst(self, argument: Any) -> None:
        args = tuple(self._pop_mark())
        self._global(argument)
        self._push(self.construct(self._stack.pop(), args))

    def _obj(self, argument: Any) -> None:
        made_of, *args = self._pop_mark()
        self._push(self.construct(made_of, tuple(args)))

    def _build(self, argument: Any) -> None:
        (state,) = self._pop(1)
        if isinstance(self._stack[-1], Rebuilt):
            self._stack[-1].build(state)  # the state of all else is left out

    def _persistent_id(self, argument: Any) -> None:
        (id_,) = self._pop(1)
        if isinstance(id_, tuple) and len(id_) == 4 and id_[0] == 'module':  # a class with its source, in old files
            self._push(id_[1])
            return
        if not (isinstance(id_, tuple) and len(id_) in (5, 6) and id_[0] == 'storage' and isinstance(id_[1], Name)):
            raise ValueError('a pickle that leads to something else than tensors outside of it')
        _, kind, key, _, count = id_[:5]
        view = id_[5] if len(id_) == 6 else None
        offset, length = (0, count) if view is None else view[1:3]
        if not all(isinstance(n, int) for n in (count, offset, length)):
            raise ValueError('a pickle with a storage whose size is no number')
        self._push(self.load_storage(StorageId(kind.text, str(key), count, (offset, length))))

    def _ignore(self, argument: Any) -> None:
        pass


_PUSHES = frozenset((
    'INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT', 'BINFLOAT', 'STRING', 'BINSTRING',
    'SHORT_BINSTRING', 'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'BYTEARRAY8', 'UNICODE', 'SHORT_BINUNICODE',
    'BINUNICODE', 'BINUNICODE8',
))  # fmt: skip
# what is not here is refused: extension codes, buffers outside of the pickle, and persistent ids as text
_OPERATIONS: Dict[str, Callable[[Unpickler, Any], None]] = {
    'PROTO': Unpickler._ignore, 'FRAME': Unpickler._ignore, 'STOP': Unpickler._ignore,
    'NONE': Unpickler._none, 'NEWTRUE': Unpickler._true, 'NEWFALSE': Unpickler._false,
    'EMPTY_TUPLE': Unpickler._empty_tuple, 'EMPTY_LIST': Unpickler._empty_list, 'EMPTY_DICT': Unpickler._empty_dict,
    'EMPTY_SET': Unpickler._empty_set, 'FROZENSET': Unpickler._frozenset, 'ADDITEMS': Unpickler._appends,
    'MARK': Unpickler._mark, 'TUPLE': Unpickler._tuple, 'TUPLE1': Unpickler._tuple1, 'TUPLE2': Unpickler._tuple2,
    'TUPLE3': Unpickler._tuple3, 'LIST': Unpickler._list, 'DICT': Unpickler._dict, 'APPEND': Unpickler._append,
    'APPENDS': Unpickler._appends, 'SETITEM': Unpickler._set_item, 'SETITEMS': Unpickler._set_items,
    'POP': Unpickler._pop_one, 'POP_MARK': Unpickler._pop_to_mark, 'DUP': Unpickler._dup,
    'PUT': Unpickler._put, 'BINPUT': Unpickler._put, 'LONG_BINPUT': Unpickler._put, 'MEMOIZE': Unpickler._memoize,
    'GET': Unpickler._get, 'BINGET': Unpickler._get, 'LONG_BINGET': Unpickler._get,
    'GLOBAL': Unpickler._global, 'STACK_GLOBAL': Unpickler._stack_global, 'REDUCE': Unpickler._reduce,
    'NEWOBJ': Unpickler._reduce, 'NEWOBJ_EX': Unpickler._new_object_ex, 'INST': Unpickler._inst,
    'OBJ': Unpickler._obj, 'BUILD': Unpickler._build, 'BINPERSID': Unpickler._persistent_id,
}  # fmt: skip
