"""Rendering of the path tracking task with pygame."""

import math
from collections import deque
from typing import Any

import numpy as np
from gymnasium.error import DependencyNotInstalled

from sb3_mpg_envs.path_tracking import dynamics
from sb3_mpg_envs.path_tracking.dynamics import VehicleParameters

try:
    import pygame
    from pygame import gfxdraw
except ImportError as error:
    raise DependencyNotInstalled(
        'Rendering the path tracking task needs pygame: run `pip install "sb3-mpg[render]"`'
    ) from error

WIDTH, HEIGHT = 900, 600  # pixels
SCENE_HEIGHT = 400  # pixels; the dashboard is below
PIXELS_PER_METRE = 14.0
CAR_LENGTH, CAR_WIDTH = 4.6, 1.9  # m
WHEEL_LENGTH, WHEEL_WIDTH = 0.8, 0.3  # m
TRAIL_LENGTH = 200  # images
# A car that moves further between two images was reset
MAX_TRAIL_GAP = 2 * dynamics.MAX_SPEED * dynamics.STEP_TIME  # m

WHITE = (255, 255, 255)
INK = (38, 43, 51)
GREY = (150, 156, 166)
PANEL = (246, 247, 249)
ROAD = (228, 233, 240)
PATH = (31, 119, 180)
TRAIL = (230, 126, 34)
BODY = (192, 57, 43)
GLASS = (110, 32, 24)
GOOD = (46, 139, 87)
BAD = (192, 57, 43)


class PathTrackingRenderer:
    """
    Draws the car on its path from above, to scale, with gauges of its tracking errors and controls.

    :param render_mode: ``human`` (a window) or ``rgb_array``
    :param vehicle: parameters of the vehicle, which give the positions of the axles
    :param fps: images per second of the window
    """

    def __init__(self, render_mode: str, vehicle: VehicleParameters, fps: int):
        self.render_mode = render_mode
        self.vehicle = vehicle
        self.fps = fps
        self.window: Any = None
        self.clock: Any = None
        # pygame.init() would start sound and video, too
        pygame.font.init()
        self.fonts = {size: pygame.font.Font(None, size) for size in (24, 28, 40)}
        self.surface = pygame.Surface((WIDTH, HEIGHT))
        self.trail: deque[tuple[float, float]] = deque(maxlen=TRAIL_LENGTH)

    def render(self, state: np.ndarray, control: np.ndarray) -> np.ndarray | None:
        """
        :param state: tracking errors, ``(6,)``
        :param control: steering angle, rad, and acceleration, m/s^2, ``(2,)``
        :return: image, ``(600, 900, 3)``, in render mode ``rgb_array``; otherwise ``None``
        """
        tracking_state = dynamics.TrackingState(*(float(value) for value in state))
        steering, acceleration = float(control[0]), float(control[1])
        self._draw_scene(tracking_state, steering)
        self._draw_dashboard(tracking_state, steering, acceleration)
        if self.render_mode == "human":
            self._show()
            return None
        return np.transpose(pygame.surfarray.array3d(self.surface), (1, 0, 2))

    def close(self) -> None:
        if self.window is not None:
            pygame.display.quit()
            self.window = None

    def _show(self) -> None:
        if self.window is None:
            pygame.display.init()
            pygame.display.set_caption("Path tracking")
            self.window = pygame.display.set_mode((WIDTH, HEIGHT))
            self.clock = pygame.time.Clock()
        self.window.blit(self.surface, (0, 0))
        pygame.event.pump()
        pygame.display.flip()
        self.clock.tick(self.fps)

    def _text(self, text: str, position: tuple[float, float], size: int = 24, color=INK, anchor: str = "topleft") -> None:
        image = self.fonts[size].render(text, True, color)
        self.surface.blit(image, image.get_rect(**{anchor: (round(position[0]), round(position[1]))}))

    def _polygon(self, points: list[tuple[float, float]], color: tuple[int, int, int]) -> None:
        pixels = [(round(x), round(y)) for x, y in points]
        gfxdraw.aapolygon(self.surface, pixels, color)
        gfxdraw.filled_polygon(self.surface, pixels, color)

    def _polyline(self, points: list[tuple[float, float]], color: tuple[int, int, int], width: int) -> None:
        if len(points) > 1:
            pygame.draw.lines(self.surface, color, False, points, width)

    def _draw_scene(self, state: dynamics.TrackingState, steering: float) -> None:
        self.surface.fill(WHITE)
        self.surface.set_clip(pygame.Rect(0, 0, WIDTH, SCENE_HEIGHT))
        y_ref, phi_ref = dynamics.path_reference(np.float64(state.x), "path", np)
        car_y, car_phi = state.lateral_error + y_ref, state.heading_error + phi_ref

        def to_pixels(x: float, y: float) -> tuple[float, float]:
            # The car stays at one third of the width. The path is periodic, so positions are relative to the car
            distance = math.remainder(x - state.x, dynamics.PATH_PERIOD)
            return WIDTH / 3 + PIXELS_PER_METRE * distance, SCENE_HEIGHT / 2 - PIXELS_PER_METRE * (y - car_y)

        path_x = state.x + np.arange(-WIDTH / 3, 2 * WIDTH / 3 + 8, 8) / PIXELS_PER_METRE
        path_y, _ = dynamics.path_reference(path_x, "path", np)
        upper = [to_pixels(x, y + dynamics.MAX_LATERAL_ERROR) for x, y in zip(path_x, path_y, strict=True)]
        lower = [to_pixels(x, y - dynamics.MAX_LATERAL_ERROR) for x, y in zip(path_x, path_y, strict=True)]
        self._polygon(upper + lower[::-1], ROAD)
        self._polyline([to_pixels(x, y) for x, y in zip(path_x, path_y, strict=True)], PATH, 3)
        self._draw_distance_marks(path_x, to_pixels)

        if self.trail and math.dist(to_pixels(*self.trail[-1]), to_pixels(state.x, car_y)) > MAX_TRAIL_GAP * PIXELS_PER_METRE:
            self.trail.clear()
        self.trail.append((state.x, car_y))
        self._polyline([to_pixels(x, y) for x, y in self.trail], TRAIL, 4)
        self._draw_car(to_pixels(state.x, car_y), car_phi, steering)

        self._draw_legend()
        self.surface.set_clip(None)

    def _draw_distance_marks(self, path_x: np.ndarray, to_pixels) -> None:
        for mark in range(math.ceil(path_x[0] / 10) * 10, math.floor(path_x[-1] / 10) * 10 + 1, 10):
            pixel_x, _ = to_pixels(mark, 0.0)
            pygame.draw.line(self.surface, GREY, (pixel_x, SCENE_HEIGHT - 8), (pixel_x, SCENE_HEIGHT), 2)
            label = f"{mark % round(dynamics.PATH_PERIOD)} m"
            self._text(label, (pixel_x, SCENE_HEIGHT - 10), color=GREY, anchor="midbottom")

    def _draw_car(self, centre: tuple[float, float], phi: float, steering: float) -> None:
        def rectangle(forward: float, left: float, length: float, width: float, turn: float) -> list[tuple[float, float]]:
            # From the frame of the car, in metres, to corners in pixels; the y axis of the image points downwards
            corners = []
            for sign_x, sign_y in ((1, 1), (1, -1), (-1, -1), (-1, 1)):
                dx, dy = sign_x * length / 2, sign_y * width / 2
                x = forward + dx * math.cos(turn) - dy * math.sin(turn)
                y = left + dx * math.sin(turn) + dy * math.cos(turn)
                corners.append(
                    (
                        centre[0] + PIXELS_PER_METRE * (x * math.cos(phi) - y * math.sin(phi)),
                        centre[1] - PIXELS_PER_METRE * (x * math.sin(phi) + y * math.cos(phi)),
                    )
                )
            return corners

        front, rear = self.vehicle.front_axle_distance, -self.vehicle.rear_axle_distance
        for side in (-1, 1):
            # Outside of the body, so that the steering angle is visible
            left = side * (CAR_WIDTH / 2 + 0.05)
            self._polygon(rectangle(front, left, WHEEL_LENGTH, WHEEL_WIDTH, steering), INK)
            self._polygon(rectangle(rear, left, WHEEL_LENGTH, WHEEL_WIDTH, 0.0), INK)
        middle = (front + rear) / 2
        self._polygon(rectangle(middle, 0.0, CAR_LENGTH, CAR_WIDTH - 0.2, 0.0), BODY)
        self._polygon(rectangle(middle + 0.55, 0.0, 0.7, CAR_WIDTH - 0.5, 0.0), GLASS)

    def _draw_legend(self) -> None:
        left, top = 14, 12
        entries = (("reference path", PATH, 3), ("trail of the car", TRAIL, 4), ("3 m to either side", ROAD, 16))
        for label, color, width in entries:
            pygame.draw.line(self.surface, color, (left, top + 9), (left + 34, top + 9), width)
            self._text(label, (left + 44, top), size=28)
            left += 44 + self.fonts[28].size(label)[0] + 28

    def _draw_dashboard(self, state: dynamics.TrackingState, steering: float, acceleration: float) -> None:
        pygame.draw.rect(self.surface, PANEL, pygame.Rect(0, SCENE_HEIGHT, WIDTH, HEIGHT - SCENE_HEIGHT))
        pygame.draw.line(self.surface, GREY, (0, SCENE_HEIGHT), (WIDTH, SCENE_HEIGHT), 2)
        degrees = math.degrees(1.0)
        max_steering = dynamics.MAX_STEERING * degrees
        columns = (
            (
                ("lateral error", state.lateral_error, dynamics.MAX_LATERAL_ERROR, "m", "{:+.2f}"),
                ("heading error", state.heading_error * degrees, dynamics.MAX_HEADING_ERROR * degrees, "deg", "{:+.1f}"),
                ("yaw rate", state.yaw_rate, dynamics.MAX_YAW_RATE, "rad/s", "{:+.2f}"),
            ),
            (
                ("speed error", state.speed_error, dynamics.MAX_SPEED - dynamics.REFERENCE_SPEED, "m/s", "{:+.1f}"),
                ("steering", steering * degrees, max_steering, "deg", "{:+.1f}"),
                ("acceleration", acceleration, dynamics.MAX_ACCELERATION, "m/s²", "{:+.1f}"),
            ),
        )
        for column, gauges in enumerate(columns):
            for row, (label, value, limit, unit, number) in enumerate(gauges):
                position = (20 + column * WIDTH // 2, SCENE_HEIGHT + 22 + 58 * row)
                is_control = column == 1 and row > 0
                self._draw_gauge(position, label, value, limit, f"{number.format(value)} {unit}", is_control)

    def _draw_gauge(
        self, position: tuple[int, int], label: str, value: float, limit: float, text: str, is_control: bool
    ) -> None:
        x, y = position
        bar = pygame.Rect(x + 140, y + 4, 160, 22)
        self._text(label, (x + 130, bar.centery), size=28, anchor="midright")
        pygame.draw.rect(self.surface, WHITE, bar)
        fraction = float(np.clip(value / limit, -1, 1))
        color = PATH if is_control else (GOOD if abs(fraction) < 0.5 else BAD)
        length = round(abs(fraction) * bar.width / 2)
        pygame.draw.rect(
            self.surface, color, pygame.Rect(bar.centerx - (length if fraction < 0 else 0), bar.top, length, bar.height)
        )
        pygame.draw.rect(self.surface, GREY, bar, 1)
        pygame.draw.line(self.surface, INK, (bar.centerx, bar.top - 4), (bar.centerx, bar.bottom + 3), 2)
        self._text(text, (bar.right + 12, bar.centery), size=28, anchor="midleft")
