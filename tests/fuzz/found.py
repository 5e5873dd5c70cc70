"""Cases that once failed; every run of the fuzz begins with them."""

from fuzz.case import Case

FOUND: list[Case] = []
