"""Tests of the program, run before and after a dependency is changed."""

import time
import unittest

import readability
import textkit

VERSION = tuple(int(part) for part in textkit.__version__.split("."))


class ReadingTime(unittest.TestCase):
    def test_an_empty_text_takes_no_time(self):
        self.assertEqual(readability.reading_seconds(""), 0)

    def test_220_words_take_a_minute(self):
        self.assertEqual(readability.reading_seconds("word " * 220), 60)

    def test_a_long_text_is_measured_in_reasonable_time(self):
        started = time.monotonic()
        for _ in range(12):
            self.assertEqual(readability.reading_seconds("word " * 200_000), 54_545)
        self.assertLess(time.monotonic() - started, 60)


class Report(unittest.TestCase):
    def test_a_report_has_a_line_for_each_text(self):
        lines = readability.report({"One": "a b c", "Two": "d"}).splitlines()
        self.assertEqual(len(lines), 4)
        self.assertIn("One", lines[2])

    def test_the_words_are_counted(self):
        self.assertIn("3", readability.report({"One": "a b c"}))


class Address(unittest.TestCase):
    def test_spaces_become_dashes(self):
        self.assertEqual(readability.address("Reading Time"), "/texts/reading-time")

    @unittest.skipIf(VERSION < (1, 4), "textkit before 1.4 drops accented letters")
    def test_accented_letters_are_kept_as_plain_ones(self):
        self.assertEqual(readability.address("Café Olé"), "/texts/cafe-ole")


if __name__ == "__main__":
    unittest.main()
