"""Interrupting the main job where it hurts."""

import os
import signal


def kill_at(step, signum=signal.SIGKILL):
    """For `before`: send the process a signal in the middle of a step."""

    def arm():
        from plugins.sdtps.task import ReID

        original = ReID.losses

        def losses(self, model, batch, now):
            if now == step:
                os.kill(os.getpid(), signum)
            return original(self, model, batch, now)

        ReID.losses = losses

    return arm
