"""Ctrl-C works in the tests, however they were started.

A job in the background of a script begins with SIGINT ignored, which it hands on to all its
children; the command would then ignore it too, as it should, and tests that interrupt it would wait
for ever.
"""

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
