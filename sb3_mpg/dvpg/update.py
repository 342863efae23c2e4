from sb3_mpg.common.rollouts.steps import RolloutContext
from sb3_mpg.common.units import Units
from sb3_mpg.mpg.update import MPGUpdate


class DVPGUpdate(MPGUpdate):
    """The gradients of DVPG, which are those of MPG; rollouts may end without the critic."""

    #: Whether rollouts end with the critic's value
    terminal_value = True

    def context(self, units: Units, gamma: float) -> RolloutContext:
        context = super().context(units, gamma)
        return context if self.terminal_value else context._replace(q_function=lambda _, actions: 0 * actions[:, :1])
