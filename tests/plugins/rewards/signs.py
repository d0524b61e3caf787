"""Two hundred texts of signs, of one to four words, and pictures of them in fonts that matplotlib brings along."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono")
SIGNS = """
Open|Closed|Exit|Bakery|Coffee|Pharmacy|Library|Museum|Parking|Taxi|Police|Hotel|Market|Florist|Laundry|Welcome|Danger
Caution|Private|Platform|Reception|Elevator|Restroom|Vacancy|Tickets|Bookshop|Barber|Garage|Harbor|Gallery|Theater
Cinema|Station|Airport|Emergency|Fragile|Recycle|Discount|Breakfast|Dentist|Kitchen|Nursery|Playground|Bicycles
Customs|Departures|Arrivals|Pottery|Antiques|Jewelry|Stop Here|No Entry|No Smoking|One Way|Slow Down|Dead End
Keep Left|Keep Right|Wet Paint|Wet Floor|Fire Exit|First Aid|Lost Property|Live Music|Grand Opening|Summer Sale
Happy Birthday|Good Morning|Hello World|Thank You|Fresh Fruit|Ice Cream|Hot Chocolate|Green Tea|Apple Pie
Daily Specials|Night Market|Corner Store|Town Hall|City Center|Bus Stop|Main Street|Ocean Drive|Oak Avenue|River Road
Maple Lane|Park Place|Bridge Street|King Street|High Street|Push Button|Mind Gap|Staff Only|Self Service|Coming Soon
Sold Out|For Rent|Free Wifi|Cash Only|Next Window|Night Shift|Deep Learning|Flow Matching|Paper Moon|Silver Lake
Golden Gate|Blue Whale|Red Planet|Black Forest|White Rabbit|Magic Carpet|Space Station|Time Machine|Robot Repair
Dragon Crossing|Secret Garden|Jazz Club|Rock Festival|Film Night|Chess Club|No Parking Here|Do Not Enter
Keep Off Grass|Beware Of Dog|Watch Your Step|Please Ring Bell|Out Of Order|Under New Management|Road Work Ahead
School Crossing Ahead|Fresh Bread Daily|Best Pizza Here|Farm To Table|Buy Local Food|Coffee And Cake|Fish And Chips
Soup And Salad|Two For One|Made With Love|Open All Night|Lost And Found|Meet At Noon|Follow The Arrow|Take A Number
Wait For Green|Mind Your Head|Hold The Door|Ask For Help|Pay At Counter|Return Books Here|The Old Mill|The Blue Door
House Of Cards|Temple Of Light|City Of Stars|Valley Of Winds|Port Of Call|Kingdom Of Paper|School Of Magic
Garden Of Glass|Fresh Bread Every Day|Please Keep The Gate|All You Can Eat|Every Child Can Read|Do Not Feed Birds
Please Wait To Be|Home Of The Brave|Life Begins At Forty|The Future Is Now|Save Water Drink Tea|Dream Big Work Hard
Never Stop Looking Up|Books Are My Friends|Make Art Not War|Love Is All Around|There Is No Planet|Keep Calm And Paint
Follow Your Own Path|Music Makes Life Better|Small Steps Every Day|Trains To The North|Boats Leave At Dawn
Last Bus At Eleven|Next Show In June|Doors Open At Seven|Kids Eat For Free|Rooms With Sea View|Bikes For Rent Here
Keys Cut While Waiting|Shoes Repaired While Waiting|World Peace|Route 66|Gate 12|Room 101|Floor 3|Open 24 Hours
Since 1985|Speed Limit 50|Track 9|Sale 70 Percent
"""
TEXTS = [text for line in SIGNS.strip().splitlines() for text in line.split("|")]
INKS = ((20, 20, 30), (140, 20, 25), (15, 60, 130), (20, 90, 45), (240, 240, 235))
BOARDS = ((250, 248, 240), (235, 225, 190), (215, 230, 240), (225, 240, 220), (45, 45, 60))


def sign(text: str, font: str, number: int, size: int = 256) -> Tensor:
    """A picture [3, size, size] of a board with `text`, two words a line; `number` chooses its colors."""
    words = text.split()
    said = "\n".join(" ".join(words[i : i + 2]) for i in range(0, len(words), 2))
    kind = number % len(INKS)
    picture = Image.new("RGB", (size, size), BOARDS[kind])
    draw = ImageDraw.Draw(picture)
    draw.multiline_text((size / 2, size / 2), said, INKS[kind], fitting(draw, said, font, size), "mm", 8, "center")
    return torch.from_numpy(np.array(picture)).movedim(-1, 0) / 255


def fitting(draw: ImageDraw.ImageDraw, said: str, font: str, size: int) -> ImageFont.FreeTypeFont:
    """The font in the largest size, up to a sixth of the picture, in which the text fits into nine tenths of it."""
    path = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf")
    for points in range(size // 6, 4, -1):
        made = ImageFont.truetype(path, points)
        if draw.multiline_textbbox((0, 0), said, made)[2] <= 0.9 * size:
            return made
    raise AssertionError(f"{said!r} does not fit")


def signs(texts: Sequence[str], font: str) -> Tensor:
    return torch.stack([sign(text, font, number) for number, text in enumerate(texts)])
