"""Figures that three pull requests of SGLang published, in milliseconds.

Source: the tables in the descriptions of sgl-project/sglang #14795 (a place for the base model, and
a scan that does not stop), #17913 (draining) and #15512 (loads that overlap). Table → policy →
stream → figure, named as in `simulator.Figures`.
"""

from collections.abc import Mapping

Stated = Mapping[str, float]

PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Stated]]] = {
    "14795": {
        "before": {
            "base": {"ttft_mean_ms": 12_717, "e2e_mean_ms": 19_469},
            "lora": {"ttft_mean_ms": 8_666, "e2e_mean_ms": 15_157, "itl_max_ms": 953},
        },
        "after": {
            "base": {"ttft_mean_ms": 73, "e2e_mean_ms": 7_472},
            "lora": {"ttft_mean_ms": 3_802, "e2e_mean_ms": 10_897, "itl_max_ms": 327},
        },
    },
    "17913": {
        "before": {
            "lora": {
                "ttft_mean_ms": 7_910,
                "ttft_p50_ms": 83,
                "ttft_p99_ms": 39_550,
                "e2e_mean_ms": 12_060,
            }
        },
        "after": {
            "lora": {
                "ttft_mean_ms": 4_279,
                "ttft_p50_ms": 3_728,
                "ttft_p99_ms": 12_081,
                "e2e_mean_ms": 8_502,
            }
        },
    },
    "15512-large": {
        "before": {
            "lora": {
                "ttft_mean_ms": 2_221,
                "ttft_p50_ms": 751,
                "ttft_p99_ms": 9_249,
                "e2e_mean_ms": 5_768,
                "tpot_p50_ms": 13.9,
            }
        },
        "after": {
            "lora": {
                "ttft_mean_ms": 1_534,
                "ttft_p50_ms": 164,
                "ttft_p99_ms": 5_724,
                "e2e_mean_ms": 4_530,
                "tpot_p50_ms": 7.8,
            }
        },
    },
    "15512-small": {
        "before": {
            "lora": {
                "ttft_mean_ms": 1_232,
                "ttft_p50_ms": 194,
                "ttft_p99_ms": 4_820,
                "e2e_mean_ms": 3_744,
                "tpot_p50_ms": 9.7,
            }
        },
        "after": {
            "lora": {
                "ttft_mean_ms": 1_014,
                "ttft_p50_ms": 126,
                "ttft_p99_ms": 3_974,
                "e2e_mean_ms": 3_408,
                "tpot_p50_ms": 9.3,
            }
        },
    },
}


def published(table: str, policy: str, stream: str) -> Stated:
    """Empty if nothing was published."""
    return PUBLISHED.get(table, {}).get(policy, {}).get(stream, {})
