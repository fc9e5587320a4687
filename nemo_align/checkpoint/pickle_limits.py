"""What a pickle would build, from its opcodes alone: refused before anything is built.

A restricted unpickler decides which names may be called; it does not bound memory or depth. Both bring down the
process, by the kernel or by the end of the C stack, where no exception can be caught.
"""

from __future__ import annotations

import pickletools

MOST_NESTED = 1000  # containers in one another; a checkpoint's metadata have fewer than ten
_REMEMBER = ("PUT", "BINPUT", "LONG_BINPUT")  # opcodes with the index of an object to remember
_RECALL = ("GET", "BINGET", "LONG_BINGET")
_CHANGE = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")  # the lowest object that they take stays


def refuse_bombs(content: bytes) -> None:
    """Refuse a pickle of a few bytes that takes tens of gigabytes, or that nests so deep that a hash ends the process.

    The unpickler's table of what to remember grows to any index that is named: a pickle has fewer entries than bytes.

    Raises:
        ValueError: an index beyond that, a nesting of more than MOST_NESTED, or no pickle.
    """
    stack: list[int | None] = []  # how deep each object is nested; None: a mark
    memory: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in _REMEMBER:
            if argument > len(content):
                raise ValueError(f"it would remember {argument:,} things in {len(content):,} bytes")
            memory[argument] = _top(stack)
        elif opcode.name == "MEMOIZE":
            memory[len(memory)] = _top(stack)
        elif opcode.name in _RECALL:
            stack.append(memory.get(argument, 0))
        elif opcode.name == "MARK":
            stack.append(None)
        elif opcode.name == "DUP":
            stack.append(_top(stack))
        else:
            taken = _take(stack, opcode)
            if opcode.name in _CHANGE and taken:
                depth = max(taken[-1], 1 + max(taken[:-1], default=-1))
            else:
                depth = 1 + max(taken, default=-1)
            if depth > MOST_NESTED:
                raise ValueError(f"it nests more than {MOST_NESTED:,} containers in one another")
            stack.extend([depth] * len(opcode.stack_after))


def _take(stack: list[int | None], opcode: pickletools.OpcodeInfo) -> list[int]:
    """What the opcode takes from the stack, from the top down."""
    before, taken = opcode.stack_before, []
    below = len(before)
    if pickletools.markobject in before:
        below = before.index(pickletools.markobject)
        while (top := _pop(stack)) is not None:
            taken.append(top)
    for _ in range(below):
        top = _pop(stack)
        if top is not None:  # POP takes a mark too
            taken.append(top)
    return taken


def _pop(stack: list[int | None]) -> int | None:
    if not stack:
        raise ValueError("it takes more from its stack than it has put there")
    return stack.pop()


def _top(stack: list[int | None]) -> int:
    if not stack or stack[-1] is None:
        raise ValueError("it remembers nothing")
    return stack[-1]
