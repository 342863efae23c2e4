"""Rendering of the inverted pendulum task with MuJoCo."""

import os
import sys
from typing import Any

import mujoco
import numpy as np

from sb3_mpg_envs.inverted_pendulum import dynamics

CAMERA = "side"


class InvertedPendulumRenderer:
    """
    Draws the cart from the side. The camera moves with the cart.

    :param render_mode: ``human`` (MuJoCo's viewer) or ``rgb_array``
    :param model: the MuJoCo model
    :raises RuntimeError: if MuJoCo finds no OpenGL on this machine
    """

    def __init__(self, render_mode: str, model: mujoco.MjModel):
        self.render_mode = render_mode
        self.model = model
        self.data = mujoco.MjData(model)
        self.renderer: Any = None
        self.viewer: Any = None
        try:
            if render_mode == "human":
                self.viewer = self._launch_viewer()
            else:
                self.renderer = mujoco.Renderer(model, dynamics.IMAGE_HEIGHT, dynamics.IMAGE_WIDTH)
        except Exception as error:
            # Without OpenGL, each backend of MuJoCo raises another exception, among them AttributeError
            raise RuntimeError(
                f"MuJoCo cannot draw on this machine ({error}). Without a display, use render_mode='rgb_array' and set the "
                "environment variable MUJOCO_GL=egl (graphics card) or MUJOCO_GL=osmesa (library libosmesa6) before MuJoCo "
                "is imported"
            ) from error

    def _launch_viewer(self) -> Any:
        # Without a display, the viewer would end the process
        if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise RuntimeError("render_mode='human' needs a display, and neither DISPLAY nor WAYLAND_DISPLAY is set")

        import mujoco.viewer

        viewer = mujoco.viewer.launch_passive(self.model, self.data, show_left_ui=False, show_right_ui=False)
        viewer.cam.type = mujoco.mjtCamera.mjCAMERA_FIXED
        viewer.cam.fixedcamid = self.model.camera(CAMERA).id
        return viewer

    def render(self, state: np.ndarray, control: np.ndarray) -> np.ndarray | None:
        """
        :param state: position, angle and their velocities, ``(4,)``
        :param control: control of the motor, ``(1,)``
        :return: image, ``(480, 720, 3)``, in render mode ``rgb_array``; otherwise ``None``
        """
        self.data.qpos[:] = state[:2]
        self.data.qvel[:] = state[2:]
        self.data.ctrl[:] = control
        mujoco.mj_forward(self.model, self.data)
        if self.viewer is not None:
            self.viewer.sync()
            return None
        self.renderer.update_scene(self.data, camera=CAMERA)
        # A copy, because the renderer may reuse its buffer
        return self.renderer.render().copy()

    def close(self) -> None:
        if self.renderer is not None:
            self.renderer.close()
            self.renderer = None
        if self.viewer is not None:
            self.viewer.close()
            self.viewer = None
