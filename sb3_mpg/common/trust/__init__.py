from sb3_mpg.common.trust.measured import FixedTrust, MeasuredTrust, Trust, make_trust, renew_trust
from sb3_mpg.common.trust.report import TrustReport
from sb3_mpg.common.trust.weighting import WeightingRule, make_weighting_rule

__all__ = [
    "FixedTrust",
    "MeasuredTrust",
    "Trust",
    "TrustReport",
    "WeightingRule",
    "make_trust",
    "make_weighting_rule",
    "renew_trust",
]
