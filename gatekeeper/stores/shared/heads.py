"""A guard of LMDB's heads: the rest of a commit that was never finished is undone."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import lmdb

Transaction: TypeAlias = Any  # lmdb.Transaction, generic in its stubs alone

HEADS_BYTES: Final = 4096


class Heads:
    """The two heads of LMDB's file, looked at by whoever has just got the writers' lock.

    A commit fills in the older head and then stores its number there, which makes it the newer one. But in LMDB's
    source nothing but the order of the lines says that the root of the tree is stored before the number, and on x86
    compilers store it after (seen in lmdb 3.0.0). Who is killed between these two instructions leaves a head that
    has the new number, and the root of two commits ago, whose pages are free to be written to.

    That can be told: each commit has a new root, and never that of two commits ago, whose page cannot have been
    free. So for each head it is remembered which root was last seen there, with its number; where the number is
    another and the root the same, the head is given what the other one says. So the commit that was never told to
    anybody is undone, and the number stands for one that changed nothing.
    """

    # In LMDB's format 1 (0.9.x, 64 bits), in words of four bytes from the start of a page.
    _MAGIC, _FORMAT, _DEPTH, _ROOT, _NUMBER = 4, 5, 23, 32, 36  # the depth above two bytes of flags
    _SAYS = slice(32, 144)  # in bytes: from the size of the map to the last page, all but the number
    _KNOWN = 0xBEEF_C0DE, 1
    _HALF = 0xFFFF_FFFF  # also the root of an empty tree, which has no depth

    def __init__(self, data: str, seen: str, page: int) -> None:
        self._page = page
        self._data = mapped(data, 2 * page)
        self._seen_file = mapped(seen, HEADS_BYTES)
        self._words = memoryview(self._data).cast("I")
        self._seen = memoryview(self._seen_file).cast("Q")  # for each head: half of the number, and of the root

    def are_known(self, env: lmdb.Environment) -> bool:
        """Whether the file is of the format that we know: it is for all processes, or for none."""
        words, other = self._words, self._page // 4
        if sys.byteorder != "little" or sys.maxsize < 1 << 32:
            return False
        if any((words[at + self._MAGIC], words[at + self._FORMAT]) != self._KNOWN for at in (0, other)):
            return False
        # In no transaction: a process that was stopped in one would be waited for. So others may commit meanwhile.
        for _ in range(1000):
            numbers = words[self._NUMBER], words[other + self._NUMBER]
            if env.info()["last_txnid"] & self._HALF in numbers:
                return True
        return False

    def guarded(self, begin: Callable[..., Transaction]) -> Callable[[None, None, bool], Transaction]:
        """`begin`, and a look at the heads."""
        words, seen, half = self._words, self._seen, self._HALF
        root, number = self._ROOT, self._NUMBER
        other_root, other_number = root + self._page // 4, number + self._page // 4
        depth, other_depth, flags = self._DEPTH, self._DEPTH + self._page // 4, 0xFFFF

        def look(db: None, parent: None, write: bool) -> Transaction:
            while True:
                txn = begin(None, None, True)
                # The root of a head whose number is as it was says nothing: a commit may have broken off before.
                last = seen[0]
                if words[number] != last >> 32:
                    if words[root] == last & half and (words[root] != half or words[depth] > flags):
                        self._mend(0)
                        txn.abort()  # it began with what was torn
                        continue
                    seen[0] = words[number] << 32 | words[root]
                last = seen[1]
                if words[other_number] != last >> 32:
                    if words[other_root] == last & half and (
                        words[other_root] != half or words[other_depth] > flags
                    ):
                        self._mend(1)
                        txn.abort()
                        continue
                    seen[1] = words[other_number] << 32 | words[other_root]
                return txn

        return look

    def _mend(self, torn: int) -> None:
        start, sound = torn * self._page, (1 - torn) * self._page
        says = self._data[sound + self._SAYS.start : sound + self._SAYS.stop]
        self._data[start + self._SAYS.start : start + self._SAYS.stop] = says
        number, root = self._words[start // 4 + self._NUMBER], self._words[start // 4 + self._ROOT]
        self._seen[torn] = number << 32 | root  # one store of eight bytes: it cannot be torn itself

    def close(self) -> None:
        self._words.release()
        self._seen.release()
        self._data.close()
        self._seen_file.close()


def mapped(path: str, size: int) -> mmap.mmap:
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(file).st_size < size:  # to touch what is not there is SIGBUS
            raise FileNotFoundError(errno.ENOENT, "too short", path)
        return mmap.mmap(file, size)
    finally:
        os.close(file)
