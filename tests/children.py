"""Child processes of tests, forked from a server that has imported everything and computed nothing.

A test's own process may hold OpenMP's threads, or another thread's lock; a child forked from it can wait for them for ever.
"""

import multiprocessing
import os
import sys
import traceback

import cloudpickle

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [  # torch._inductor is imported where deterministic algorithms are asked for, and takes as long as torch itself
        *("torch", "torch._inductor", "torch.utils.tensorboard", "rich.table", "PIL.Image", "einops", "jaxtyping", "scipy.ndimage"),
        *("core.trainer", "core.profile", "repro.run", "repro.show", "repro.cli"),
        *("plugins.sdtps.task", "plugins.sdtps.rgbnt_sample"),
    ]
)


def _child(function, folder, environment, out, err):
    for path, number in ((out, 1), (err, 2)):
        if path is not None:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    status = 99
    try:
        status = cloudpickle.loads(function)() or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(function, *, folder=None, out=None, err=None):
    """Call the function, which may be a closure, in a child process. Returns its exit status, or minus the signal that ended it.

    The child has this process's environment and folder (or `folder`), and writes to the files `out` and `err` if given. What
    the function returns is the status; 99 stands for an exception.
    """
    given = (cloudpickle.dumps(function), str(folder or os.getcwd()), dict(os.environ), out, err)
    child = _server.Process(target=_child, args=given)
    child.start()
    child.join()
    return child.exitcode
