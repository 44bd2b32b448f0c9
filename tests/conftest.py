"""Ctrl-C works in the tests, however they were started.

A job in the background of a script begins with SIGINT ignored, which it hands on to all its
children; the command would then ignore it too, as it should, and tests that interrupt it would wait
for ever.

Workers that share the cores compute with one thread each, but where a test asks for several: each
other's threads would keep them waiting.
"""

import os
import signal

from specdec import cores

if "PYTEST_XDIST_WORKER" in os.environ:
    cores.MOST = 1

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
