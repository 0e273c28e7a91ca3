"""Line editing at the prompt: characters of any script, pastes as one message, completion at Tab, and a history in a file.

It needs the module readline, which may be GNU readline, libedit (macOS) or missing (Windows). libedit cannot tell a paste from
typed lines. Without readline, lines are read as the terminal edits them.
"""

import contextlib
import locale
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_ENTRIES = 1000  # entries that a session reads from the history file; the file is shortened when it has twice as many
PASTE_ON, PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"  # ask the terminal to mark pasted text, or not to


def history_path() -> Path:
    """Return the path of the history file. Raises RuntimeError if the home folder is unknown."""
    state = Path(os.environ.get("XDG_STATE_HOME") or "")
    return (state if state.is_absolute() else Path.home() / ".local" / "state") / "llama" / "history"


class History:
    """Messages and commands of this session and earlier ones, oldest first. A failure to read or write them has no effect.

    In the file, a newline ends an entry, and a carriage return with a newline is a newline within an entry.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[str] = []
        with contextlib.suppress(OSError):
            text = path.read_bytes().decode(errors="replace")
            self.entries = [entry.replace("\r", "\n") for entry in text.replace("\r\n", "\r").split("\n") if entry]
            if len(self.entries) > 2 * MAX_ENTRIES:
                shorter = path.with_name(f"{path.name}.{os.getpid()}")
                self._write(shorter, self.entries[-MAX_ENTRIES:])
                shorter.replace(path)
            del self.entries[:-MAX_ENTRIES]

    def add(self, entry: str) -> None:
        """Add an entry to the end of the file, unless it repeats the entry before."""
        if entry not in self.entries[-1:]:
            self.entries.append(entry)
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._write(self.path, [entry])

    @staticmethod
    def _write(path: Path, entries: list[str]) -> None:
        text = "".join(entry.replace("\r", "").replace("\n", "\r\n") + "\n" for entry in entries)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "wb") as f:
            f.write(text.encode(errors="replace"))


def use_utf8_locale() -> None:
    """Make readline edit characters, not bytes, if standard input is UTF-8 but the locale has another encoding.

    Python reads UTF-8 under LC_ALL=C, and if the locale is not installed. But readline asks the environment for the locale
    before each line.
    """
    utf8 = ("utf-8", "utf8")
    if (sys.stdin.encoding or "").lower() not in utf8 or locale.nl_langinfo(locale.CODESET).lower() in utf8:
        return
    for name in ("C.UTF-8", "UTF-8", "en_US.UTF-8"):
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, name)
            os.environ["LC_ALL" if os.environ.get("LC_ALL") else "LC_CTYPE"] = name
            return


class LineEditor:
    """The module readline, set up for messages.

    complete: returns what the text before the cursor may become at Tab; None if Tab inserts a tab.
    """

    def __init__(self, complete: Callable[[str], list[str] | None], keep_history: bool) -> None:
        self.readline: Any = None
        self.marks_pastes = self.is_gnu = False
        self.history: History | None = None
        if hasattr(locale, "nl_langinfo"):  # not on Windows
            use_utf8_locale()
        with contextlib.suppress(ImportError):
            import readline

            self.readline = readline
        if self.readline is None:
            return
        self.complete, self.completions = complete, list[str]()
        self.readline.set_completer(self._completion)
        self.readline.set_completer_delims("")
        self.readline.set_auto_history(False)
        self.is_gnu = "GNU" in (self.readline.__doc__ or "")
        self.marks_pastes = self.is_gnu and os.environ.get("TERM", "dumb") != "dumb"
        bindings: tuple[str, ...]
        if self.is_gnu:
            paste = "on" if self.marks_pastes else "off"
            meta = "set input-meta on", "set output-meta on", "set convert-meta off"
            bindings = (*meta, f"set enable-bracketed-paste {paste}", "tab: complete")
        else:
            bindings = ("bind ^I rl_complete",)
        for binding in bindings:
            self.readline.parse_and_bind(binding)
        if keep_history:
            with contextlib.suppress(RuntimeError):
                self.history = History(history_path())
                for entry in self.history.entries:
                    self.readline.add_history(entry)

    def remember(self, entry: str) -> None:
        """Add an entry to the history of this session and, if one is kept, to the history file."""
        if self.readline is not None and entry.strip():
            self.readline.add_history(entry)
        if self.history is not None and entry.strip():
            self.history.add(entry)

    def _completion(self, text: str, index: int) -> str | None:
        """Return a completion of the text before the cursor, as `readline` asks for them: by index, until None."""
        if index == 0:
            completions = self.complete(text)
            if completions is None:
                self.readline.insert_text("\t")
                self.readline.redisplay()
                completions = [""]
            self.completions = completions
        return self.completions[index] if index < len(self.completions) else None
