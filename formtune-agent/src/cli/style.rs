//! How output looks: colour and symbols only ever add to words.

use crate::cli::OneLine;
use formtune_core::units::Nanos;
use std::io::IsTerminal;

/// What the terminal can show.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// Colours may be used.
    pub colour: bool,
    /// Characters beyond ASCII may be used.
    pub unicode: bool,
    /// Columns.
    pub width: usize,
}

/// How good something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// As it should be.
    Good,
    /// Worth a look.
    Notice,
    /// Wrong.
    Bad,
    /// Of less interest.
    Dim,
}

impl Style {
    /// Of standard output: no colour when it is not a terminal, or when `NO_COLOR` is set;
    /// ASCII unless the locale says UTF-8; as wide as the terminal, else 80 columns.
    pub fn of_stdout() -> Self {
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let terminal = std::io::stdout().is_terminal();
        let dumb = set("TERM").is_none_or(|term| term == "dumb");
        let locale = set("LC_ALL").or_else(|| set("LC_CTYPE")).or_else(|| set("LANG"));
        let locale = locale.unwrap_or_default().to_ascii_lowercase();
        let width = terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
        Self {
            colour: terminal && !dumb && set("NO_COLOR").is_none(),
            unicode: locale.contains("utf-8") || locale.contains("utf8"),
            width: width.filter(|_| terminal).unwrap_or(80).max(55),
        }
    }

    /// The text in a colour, where there are colours.
    pub fn paint(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            _ if !self.colour => return text.to_owned(),
            Tone::Good => 32,
            Tone::Notice => 33,
            Tone::Bad => 31,
            Tone::Dim => 2,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    /// The text as this terminal can show it; one column per character stays one column.
    pub fn finish(self, text: &str) -> String {
        if self.unicode {
            return text.to_owned();
        }
        let ascii = |c| match c {
            'µ' => 'u',
            '…' => '~',
            '→' => '>',
            '✓' => '+',
            '✗' => 'x',
            '·' => '.',
            '−' | '–' => '-',
            c if c.is_ascii() => c,
            _ => '?',
        };
        text.chars().map(ascii).collect()
    }

    /// Breaks `text` into lines that fit beside an indent of `indent` columns.
    pub fn wrap(self, indent: usize, text: &str) -> String {
        let room = self.width.min(100).saturating_sub(indent).max(20);
        let mut lines = String::new();
        let mut used = 0;
        for word in text.split_whitespace() {
            let length = word.chars().count();
            if used > 0 && used + 1 + length > room {
                lines.push('\n');
                lines.push_str(&" ".repeat(indent));
                used = 0;
            }
            if used > 0 {
                lines.push(' ');
                used += 1;
            }
            lines.push_str(word);
            used += length;
        }
        lines
    }
}

/// Text from outside on one line and at most `room` columns, cut with `…`.
pub fn cut(text: &str, room: usize) -> String {
    let text = OneLine(text).to_string();
    if text.chars().count() <= room {
        return text;
    }
    text.chars().take(room.saturating_sub(1)).chain(['…']).collect()
}

/// A latency in at most six columns: `870 ns`, `4.2 ms`, `120 µs`.
pub fn latency(of: Option<Nanos>) -> String {
    let Some(Nanos(ns)) = of else { return "–".into() };
    let mut value = ns as f64;
    for unit in ["ns", "µs", "ms"] {
        // Whatever would be rounded up to 1000 is written in the next unit.
        if value < 999.5 {
            return scaled(value, unit);
        }
        value /= 1e3;
    }
    scaled(value, "s")
}

fn scaled(value: f64, unit: &str) -> String {
    if value < 9.95 && unit != "ns" {
        format!("{value:.1} {unit}")
    } else {
        format!("{value:.0} {unit}")
    }
}

/// An age in at most three columns: `3s`, `12m`, `5h`, `9d`.
pub fn age_short(age: Nanos) -> String {
    let s = age.0 / 1_000_000_000;
    match s {
        0..100 => format!("{s}s"),
        100..6_000 => format!("{}m", s / 60),
        6_000..172_800 => format!("{}h", s / 3_600),
        _ => format!("{}d", s / 86_400),
    }
}

/// An age in words: `3 s`, `12 min`, `5 h 10 min`, `9 d 4 h`.
pub fn age(age: Nanos) -> String {
    let s = age.0 / 1_000_000_000;
    match s {
        0..100 => format!("{s} s"),
        100..3_600 => format!("{} min", s / 60),
        3_600..86_400 => format!("{} h {} min", s / 3_600, s % 3_600 / 60),
        _ => format!("{} d {} h", s / 86_400, s % 86_400 / 3_600),
    }
}

/// A number with its thousands apart: `1,204`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_fit_six_columns() {
        let all = [
            (0, "0 ns"),
            (999, "999 ns"),
            (1_000, "1.0 µs"),
            (9_949, "9.9 µs"),
            (9_951, "10 µs"),
            (999_499, "999 µs"),
            (999_501, "1.0 ms"),
            (12_600_000, "13 ms"),
            (8_590_000_000, "8.6 s"),
            (99_000_000_000, "99 s"),
        ];
        for (ns, text) in all {
            assert_eq!(latency(Some(Nanos(ns))), text);
            assert!(text.chars().count() <= 6);
        }
    }

    #[test]
    fn ages_fit_three_columns() {
        for s in [0, 3, 99, 100, 5_999, 6_000, 172_799, 172_800, 86_400 * 99] {
            let text = age_short(Nanos::from_secs(s));
            assert!(text.len() <= 3, "{text}");
        }
        assert_eq!(age(Nanos::from_secs(19_000)), "5 h 16 min");
    }

    #[test]
    fn text_from_outside_cannot_drive_the_terminal() {
        assert_eq!(cut("a\x1b[2J", 20), "a\\u{1b}[2J");
        assert_eq!(cut("abcdefgh", 4), "abc…");
    }

    #[test]
    fn ascii_keeps_the_columns() {
        let style = Style { colour: false, unicode: false, width: 80 };
        assert_eq!(style.finish("✗ missed  12 µs → é"), "x missed  12 us > ?");
        assert_eq!(grouped(1_234_567), "1,234,567");
    }
}
