"""The module of an entry point whose import never ends."""

import time

while True:
    time.sleep(3600)
