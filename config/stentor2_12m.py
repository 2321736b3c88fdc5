"""Stentor2-12M: the Preview's shape on FineWeb-HQ, twice the tokens, both of Kaggle's T4s.

Shape and tokens are from the family table in Stentor3-20M's card. What no table gives is the Preview's.
"""

from dataclasses import replace

from config import Source
from config.stentor2_12m_preview import config as preview

config = replace(
    preview,
    name="stentor2_12m",
    data_dir="data/stentor2",  # Stentor2-30M's too
    # Its page on the hub lists StentorLabs/StenCore beside FineWeb-HQ, but no share, so we leave it out. No card names
    # a crawl for Stentor2, so we take Stentor3's.
    sources={"web": Source("epfml/FineWeb-HQ", data_files=("data/CC-MAIN-2024-51/*",), held_out=2000)},
    # The Preview's 16,384 tokens, on each T4. The table's 480 million tokens then take as many steps as the Preview.
    tokens_per_step=32_768,
    max_steps=14_649,
)
