# SPDX-License-Identifier: Apache-2.0
"""The tables of this folder's README, made from the tables that the code reads."""

from __future__ import annotations

from itertools import groupby

from visprune.backbones.encoders import AROUND, BIASED, PLAIN, REFUSED, TABLE, TIMM_AROUND, WHOLE


def tables() -> str:
    """Which encoders are taken, which models around them, and which are refused and why."""
    others = ", ".join(f"`{name}`" for name in TABLE if not name.startswith("transformers."))
    plain = ", ".join(f"`{name}`" for name in sorted(PLAIN, key=str.lower))
    biased = ", ".join(f"`{name}`" for name in BIASED)
    whole = ", ".join(f"`{name}`" for name in WHOLE)
    around = ", ".join(f"`{name}`" for name in (*sorted(AROUND, key=str.lower), *TIMM_AROUND))
    lines = [
        "## Taken\n",
        f"{others};\n",
        f"of transformers, and their subclasses: {plain};\n",
        f"by methods that merge no tokens, as their attention adds a bias per pair of places: "
        f"{biased}, `timm.Beit`, `timm.VisionTransformerRelPos`;\n",
        f"by methods that give every patch a value back (`tome`, `pitome`, `ipcv`): {whole}, "
        f"`timm.DeepseekVitEncoder`, `timm.Gemma4VitEncoder`, `timm.Qwen3VitEncoder`;\n",
        f"models around one: {around}, `TimmWrapperModel`, `TimmWrapperForImageClassification`.\n",
        "## Refused\n",
        "| classes | because |",
        "|---|---|",
    ]
    rows = sorted(((why, name) for name, why in REFUSED.items()), key=lambda row: row[0])
    for why, members in groupby(rows, key=lambda row: row[0]):
        names = sorted(name for _, name in members)
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {why} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(tables(), end="")
