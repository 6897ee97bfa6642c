"""All commands of this package behind one name

timm-coretune COMMAND ...
python -m timm_coretune COMMAND ...
"""

import difflib
import importlib
import sys
from typing import Dict, List, NamedTuple, NoReturn, Optional, Sequence, Tuple

from .version import __version__


class Command(NamedTuple):
    """A command, and who runs it.

    Attributes:
        help: What it does, in one line.
        module: Module whose `main` takes the arguments. It is imported when the command is called, not before.
        first: Arguments that `main` gets before those of the user.
        leading: Flags whose values the user may give as the first words.
    """

    help: str
    module: str
    first: Tuple[str, ...] = ()
    leading: Tuple[str, ...] = ()


COMMANDS: Dict[str, Command] = {
    'train': Command('tune a model, with the flags of train.py', 'timm_coretune.train.__main__'),
    'predict': Command('classify images, or write a mask for each', 'timm_coretune.prediction.__main__'),
    'evaluate': Command(
        'validate MODEL [DATA_DIR], with the flags of train.py',
        'timm_coretune.train.__main__',
        ('--eval-only',),
        ('--model', '--data-dir'),
    ),
    'replay': Command('repeat the step in which a run diverged', 'timm_coretune.train.replay'),
    'report': Command('write the report of a run as one page of HTML', 'timm_coretune.report.__main__'),
    'sample': Command('write the bundled sample of scenes', 'timm_coretune.segmentation.__main__', ('sample',)),
    'masks': Command('convert annotations to images with masks', 'timm_coretune.segmentation.convert.__main__'),
    'checkpoint': Command('look into a checkpoint, or convert it', 'timm_coretune.checkpoint.__main__'),
    'hub': Command('push a finished run to the Hugging Face Hub', 'timm_coretune.hub.__main__'),
}


def usage() -> str:
    """What there is to call, one command a line."""
    lines = [f'  {name:12}{command.help}' for name, command in COMMANDS.items()]
    return '\n'.join(
        [
            'usage: timm-coretune COMMAND ...',
            '',
            'commands:',
            *lines,
            '',
            'timm-coretune COMMAND --help shows the arguments of a command, timm-coretune --version the version.',
            'To train on several devices: accelerate launch -m timm_coretune train ...',
        ]
    )


def _refuse(reason: str) -> NoReturn:
    print(f'{usage()}\n\nerror: {reason}', file=sys.stderr)
    sys.exit(2)


def name_leading(words: List[str], flags: Sequence[str]) -> List[str]:
    """Put flags before the first words, as far as these are no flags themselves."""
    num_words = next((place for place, word in enumerate(words) if word.startswith('-')), len(words))
    named = [word for pair in zip(flags, words[:num_words], strict=False) for word in pair]
    return [*named, *words[min(num_words, len(flags)) :]]


def main(arguments: Optional[List[str]] = None) -> None:
    """Run the command that the first argument names with the arguments behind it.

    Args:
        arguments: Words of the command line, those of the process when None.

    Raises:
        SystemExit: With code 2 if there is no such command, or with the code of the command.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        _refuse('expected a command, got none.')
    word, *rest = arguments
    if word in ('-h', '--help'):
        print(usage())
    elif word == '--version':
        print(f'timm_coretune {__version__}')
    elif word in COMMANDS:
        command = COMMANDS[word]
        rest = name_leading(rest, command.leading)
        # what it returns is dropped: a console script would take it for an exit code
        importlib.import_module(command.module).main([*command.first, *rest])
    else:
        near = difflib.get_close_matches(word, COMMANDS, n=1)
        _refuse(f'expected a command, got {word!r}.' + (f' Did you mean {near[0]}?' if near else ''))


if __name__ == '__main__':
    main()
