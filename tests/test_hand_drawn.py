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


def yellow_star_of_lines_on_grey():
    image, d = canvas(256, 256, (128, 130, 126))
    d.line([(128, 50), (150, 110), (212, 112), (163, 150), (180, 210), (128, 175), (76, 210), (93, 150),
            (44, 112), (106, 110), (128, 50)], fill=(250, 215, 30), width=9)
    return image


def green_heart_on_dark():
    image, d = canvas(280, 280, (44, 42, 50))
    d.ellipse((70, 80, 145, 155), fill=(60, 190, 80))
    d.ellipse((135, 80, 210, 155), fill=(60, 190, 80))
    d.polygon([(74, 132), (206, 132), (140, 220)], fill=(60, 190, 80))
    return image


def outlines_of_a_square_and_a_circle():
    image, d = canvas(320, 320)
    d.rectangle((40, 110, 120, 190), outline=(30, 60, 210), width=8)
    d.ellipse((195, 105, 285, 195), outline=(215, 30, 40), width=8)
    return image


def three_in_a_row():
    image, d = canvas(360, 360, (250, 248, 240))
    d.ellipse((25, 140, 95, 210), fill=(215, 30, 40))
    d.rectangle((150, 145, 210, 205), fill=(35, 150, 60))
    d.polygon([(305, 135), (265, 215), (345, 215)], fill=(15, 15, 18))
    return image


def three_in_a_column_on_grey():
    image, d = canvas(300, 300, (150, 150, 150))
    d.rectangle((125, 15, 175, 65), fill=(30, 60, 200))
    d.ellipse((122, 122, 178, 178), fill=(245, 215, 30))
    d.rectangle((140, 230, 160, 290), fill=(200, 25, 35))
    d.rectangle((120, 250, 180, 270), fill=(200, 25, 35))
    return image


def six_blue_squares():
    image, d = canvas(300, 300)
    for x, y in ((55, 60), (150, 50), (240, 75), (70, 170), (160, 230), (245, 190)):
        d.rectangle((x - 26, y - 26, x + 26, y + 26), fill=(40, 80, 220))
    return image


def red_star_which_no_training_picture_has():
    image, d = canvas(300, 300)
    d.polygon([(150, 70), (172, 128), (234, 130), (185, 168), (203, 228),
               (150, 192), (97, 228), (115, 168), (66, 130), (128, 128)], fill=(215, 30, 40))
    return image


PICTURES = [
    (red_disc, "What color is the circle?", "The circle is red."),
    (red_disc, "Where is the circle?", "The circle is in the middle."),
    (green_triangle_low, "What shape is the green thing?", "The green thing is a triangle."),
    (blue_square_right, "Where is the square?", "The square is on the right."),
    (purple_cross, "What color is the cross?", "The cross is purple."),
    (yellow_star_and_black_square, "What color is the star?", "The star is yellow."),
    (yellow_star_and_black_square, "Seen from the star, where is the square?",
     "Seen from the star, the square is on the right."),
    (red_heart_over_blue_circle, "What color is the circle?", "The circle is blue."),
    (three_green_circles, "How many circles are there?", "The number of circles is three."),
    (big_black_triangle_small_red_square, "Which is bigger, the triangle or the square?",
     "The bigger one is the triangle."),
    (yellow_star_of_lines_on_grey, "What color is the star?", "The star is yellow."),
    (green_heart_on_dark, "What shape is the green thing?", "The green thing is a heart."),
    (outlines_of_a_square_and_a_circle, "What color is the square?", "The square is blue."),
    (outlines_of_a_square_and_a_circle, "Where is the circle?", "The circle is on the right."),
    (three_in_a_row, "What is in the middle?", "In the middle is the square."),
    (three_in_a_row, "What color is the triangle?", "The triangle is black."),
    (three_in_a_column_on_grey, "What color is the circle?", "The circle is yellow."),
    (three_in_a_column_on_grey, "Where is the cross?", "The cross is at the bottom."),
    (six_blue_squares, "How many squares are there?", "The number of squares is six."),
    (red_star_which_no_training_picture_has, "What color is the star?", "The star is red."),
]


def test_at_least_sixteen_of_twenty_answers_are_right(monkeypatch, capsys, tmp_path):
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
    assert sum(right) >= 16, "\n".join(report)
