"""Imported by name, before all else, in the process that ranks are forked from: that one is killed with its launcher.

By itself it would go on for as long as a rank does, and the ranks for as long as it does.
"""

import gc
import os

from lisa_dist.runtime.signals import die_with

die_with(os.getppid())
gc.disable()  # until a rank begins: importing leaves no garbage, and looking for it takes an eighth of the time
