"""The demo model reads hand-drawn pictures. Their size, strokes and format differ from the generated ones."""
from conftest import ROOT, run_main
from PIL import Image, ImageDraw

import sample


def canvas(width, height, paper=(255, 255, 255)):
    image = Image.new("RGB", (width, height), paper)
    return image, ImageDraw.Draw(image)


def red_disc():
    image, d = canvas(300, 300)
    d.ellipse((90, 85, 215, 210), fill=(214, 30, 38))
    return image


def green_triangle_low():
    image, d = canvas(256, 256, (246, 244, 238))
    d.polygon([(128, 148), (80, 240), (176, 240)], fill=(30, 150, 60))
    return image


def blue_square_right():
    image, d = canvas(320, 320, (240, 246, 250))
    d.rectangle((200, 110, 300, 212), fill=(28, 70, 205), outline=(10, 20, 60), width=3)
    return image


def purple_cross():
    image, d = canvas(200, 200)
    d.rectangle((85, 50, 115, 150), fill=(128, 30, 150))
    d.rectangle((50, 85, 150, 115), fill=(128, 30, 150))
    return image


def yellow_star_and_black_square():
    image, d = canvas(400, 400, (250, 250, 250))
    d.polygon([(100, 130), (117, 178), (168, 180), (128, 211), (142, 260),
               (100, 232), (58, 260), (72, 211), (32, 180), (83, 178)], fill=(245, 205, 20))
    d.rectangle((265, 165, 335, 235), fill=(15, 15, 15))
    return image


def red_heart_over_blue_circle():
    image, d = canvas(300, 300)
    d.ellipse((105, 25, 155, 75), fill=(220, 25, 45))
    d.ellipse((145, 25, 195, 75), fill=(220, 25, 45))
    d.polygon([(108, 60), (192, 60), (150, 128)], fill=(220, 25, 45))
    d.ellipse((120, 195, 185, 260), fill=(35, 80, 220))
    return image


def three_green_circles():
    image, d = canvas(256, 256)
    for x, y in ((50, 60), (170, 90), (95, 190)):
        d.ellipse((x - 24, y - 24, x + 24, y + 24), fill=(20, 160, 70))
    return image


def big_black_triangle_small_red_square():
    image, d = canvas(360, 360, (252, 250, 245))
    d.polygon([(105, 95), (25, 250), (185, 250)], fill=(20, 18, 22))
    d.rectangle((255, 150, 325, 220), fill=(205, 35, 30))
    return image


PICTURES = [
    (red_disc, "What color is the circle?", "The circle is red."),
    (red_disc, "Where is the circle?", "The circle is at the middle."),
    (green_triangle_low, "What shape is the green thing?", "The green thing is a triangle."),
    (blue_square_right, "Where is the square?", "The square is at the right."),
    (purple_cross, "What color is the cross?", "The cross is purple."),
    (yellow_star_and_black_square, "What color is the star?", "The star is yellow."),
    (yellow_star_and_black_square, "Seen from the star, where is the square?",
     "Seen from there, the square is right."),
    (red_heart_over_blue_circle, "What color is the circle?", "The circle is blue."),
    (three_green_circles, "How many circles are there?", "The number of circles is three."),
    (big_black_triangle_small_red_square, "Which shape is bigger?", "The shape that is big is the triangle."),
]


def test_at_least_eight_of_ten_answers_are_right(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    right, report = [], []
    for i, (draw, question, answer) in enumerate(PICTURES):
        path = tmp_path / f"{i}.{'jpg' if i % 2 else 'png'}"
        draw().save(path)
        run_main(monkeypatch, sample.main, "--image", path, "--prompt", question)
        said = capsys.readouterr().out.strip()
        right.append(said.endswith(answer))  # a description of the picture comes first
        wrong = "" if right[-1] else f" (expected {answer})"
        report.append(f"{draw.__name__}: {question} -> {said}{wrong}")
    print("\n".join(report))
    assert sum(right) >= 8, "\n".join(report)
