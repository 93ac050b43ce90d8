"""What a launcher must do, under the names that it is written with.

It is defined in supar_sweep.sweep.jobs, because `complete` and `tune` are handed a launcher and
import none of these modules.
"""

from supar_sweep.sweep.jobs import Event as Event
from supar_sweep.sweep.jobs import Job as Job
from supar_sweep.sweep.jobs import Launcher as Launcher
from supar_sweep.sweep.jobs import folder_of as folder_of
