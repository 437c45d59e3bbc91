//! Typed access to a [`Node`]: every refusal says where, which key, and what is allowed.

use super::ConfigError;
use super::document::{Entry, Node, Source, Value};
use formtune_core::units::Nanos;
use std::fmt;
use std::ops::RangeInclusive;

/// A table whose keys have all been checked against a list.
#[derive(Clone, Copy)]
pub(super) struct Section<'a> {
    source: &'a Source,
    entries: &'a [Entry],
    keys: &'static [&'static str],
    pub offset: usize,
}

impl<'a> Section<'a> {
    /// The top of a document.
    pub fn root(
        source: &'a Source,
        node: &'a Node,
        keys: &'static [&'static str],
    ) -> Result<Self, ConfigError> {
        Field { source, key: "", node }.section(keys)
    }

    /// The value of a key, which must be one of those the section was opened with.
    pub fn get(&self, key: &'static str) -> Option<Field<'a>> {
        debug_assert!(self.keys.contains(&key), "`{key}` is read but not listed as known");
        let entry = self.entries.iter().find(|entry| entry.key == key)?;
        Some(Field { source: self.source, key, node: &entry.node })
    }

    /// The value of a key that must be there.
    pub fn required(&self, key: &'static str) -> Result<Field<'a>, ConfigError> {
        self.get(key)
            .ok_or_else(|| self.source.error(self.offset, format_args!("missing key `{key}`")))
    }

    /// An error about several keys that do not fit each other, at the first of them that the
    /// file gives (another may be a default).
    pub fn error_at(&self, keys: &[&'static str], what: impl fmt::Display) -> ConfigError {
        let given = keys.iter().find_map(|key| self.get(key));
        self.source.error(given.map_or(self.offset, |field| field.node.offset), what)
    }
}

/// A value with the key it stands under.
#[derive(Clone, Copy)]
pub(super) struct Field<'a> {
    pub source: &'a Source,
    pub key: &'a str,
    pub node: &'a Node,
}

impl<'a> Field<'a> {
    /// An error at this value.
    pub fn error(&self, what: impl fmt::Display) -> ConfigError {
        self.source.error(self.node.offset, what)
    }

    fn expected(&self, what: &str) -> ConfigError {
        let found = self.node.value.kind();
        match self.key {
            "" => self.error(format_args!("expected {what}, found {found}")),
            key => self.error(format_args!("`{key}` must be {what}, not {found}")),
        }
    }

    pub fn string(&self) -> Result<&'a str, ConfigError> {
        match &self.node.value {
            Value::String(string) if string.is_empty() => {
                Err(self.error(format_args!("`{}` is empty", self.key)))
            }
            Value::String(string) => Ok(string),
            _ => Err(self.expected("a string")),
        }
    }

    pub fn integer(&self, range: RangeInclusive<i64>) -> Result<i64, ConfigError> {
        let Value::Integer(integer) = self.node.value else {
            return Err(self.expected("an integer"));
        };
        if !range.contains(&integer) {
            let (least, most) = (range.start(), range.end());
            return Err(
                self.error(format_args!("`{}` is {integer}, outside {least} to {most}", self.key))
            );
        }
        Ok(integer)
    }

    pub fn number(&self, range: RangeInclusive<f64>) -> Result<f64, ConfigError> {
        let number = match self.node.value {
            Value::Integer(integer) => integer as f64,
            Value::Float(float) => float,
            _ => return Err(self.expected("a number")),
        };
        if !range.contains(&number) {
            let (least, most) = (range.start(), range.end());
            return Err(
                self.error(format_args!("`{}` is {number}, outside {least} to {most}", self.key))
            );
        }
        Ok(number)
    }

    /// A number above `least`, where `least` itself has no meaning.
    pub fn number_above(&self, least: f64, most: f64) -> Result<f64, ConfigError> {
        match self.number(least..=most) {
            Ok(number) if number == least => Err(self.error(format_args!(
                "`{}` is {number}, must be above {least} and at most {most}",
                self.key
            ))),
            other => other,
        }
    }

    pub fn duration(&self, range: RangeInclusive<Nanos>) -> Result<Nanos, ConfigError> {
        let string = match &self.node.value {
            Value::String(string) => string,
            Value::Integer(_) | Value::Float(_) => {
                return Err(self.error(format_args!(
                    "`{}` needs a unit, such as \"250ms\" or \"2 s\"",
                    self.key
                )));
            }
            _ => return Err(self.expected("a time such as \"250ms\"")),
        };
        let Some(duration) = parse_duration(string) else {
            let key = self.key;
            return Err(self.error(format_args!(
                "`{key}` is \"{string}\", not a time such as \"250ms\" or \"2 s\""
            )));
        };
        if !range.contains(&duration) {
            let (least, most) = (write_duration(*range.start()), write_duration(*range.end()));
            return Err(self
                .error(format_args!("`{}` is \"{string}\", outside {least} to {most}", self.key)));
        }
        Ok(duration)
    }

    /// One of a few words.
    pub fn one_of<T: Copy>(&self, words: &[(&'static str, T)]) -> Result<T, ConfigError> {
        let string = self.string()?;
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == string) {
            return Ok(*value);
        }
        let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        Err(self.error(format_args!("`{}` is \"{string}\", must be {}", self.key, one_of(&known))))
    }

    pub fn list(&self) -> Result<Vec<Field<'a>>, ConfigError> {
        let Value::Array(nodes) = &self.node.value else { return Err(self.expected("a list")) };
        Ok(nodes.iter().map(|node| Field { node, ..*self }).collect())
    }

    /// A table with known keys only.
    pub fn section(&self, keys: &'static [&'static str]) -> Result<Section<'a>, ConfigError> {
        let Value::Table(entries) = &self.node.value else { return Err(self.expected("a table")) };
        for entry in entries {
            if !keys.contains(&entry.key.as_str()) {
                return Err(unknown_key(self.source, entry, self.key, keys));
            }
        }
        Ok(Section { source: self.source, entries, keys, offset: self.node.offset })
    }

    /// A table whose keys are names of the operator's own.
    pub fn named(
        &self,
    ) -> Result<impl Iterator<Item = (&'a Entry, Field<'a>)> + use<'a>, ConfigError> {
        let Value::Table(entries) = &self.node.value else { return Err(self.expected("a table")) };
        let source = self.source;
        Ok(entries
            .iter()
            .map(move |entry| (entry, Field { source, key: &entry.key, node: &entry.node })))
    }
}

/// The error for a key that is not in `known`, naming the nearest one that is.
pub(super) fn unknown_key(
    source: &Source,
    entry: &Entry,
    within: &str,
    known: &[&str],
) -> ConfigError {
    let place = if within.is_empty() { String::new() } else { format!(" in `{within}`") };
    let hint = match nearest(&entry.key, known.iter().copied()) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("known keys: {}", known.join(", ")),
    };
    source.error(entry.key_offset, format_args!("unknown key `{}`{place}, {hint}", entry.key))
}

/// The known name most like `name`, if any is alike at all.
pub(super) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(likeness, _)| *likeness >= 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// `"a", "b" or "c"`.
fn one_of(words: &[&str]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
    match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
        None => String::new(),
    }
}

/// Units of a time, longest first, in nanoseconds.
const UNITS: &[(&str, u64)] = &[
    ("h", 3_600_000_000_000),
    ("min", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("µs", 1_000),
    ("ns", 1),
];

/// Reads a time of the command line as one of the file is read.
///
/// # Errors
/// It is not one; the text says what would be.
pub fn duration(text: &str) -> Result<Nanos, String> {
    parse_duration(text).ok_or_else(|| "not a time such as \"250ms\" or \"2 s\"".to_owned())
}

/// Reads `250ms`, `1.5 s`, `2 min`.
fn parse_duration(text: &str) -> Option<Nanos> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit.trim())?;
    if !number.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let ns = number.parse::<f64>().ok()? * *factor as f64;
    (ns.is_finite() && ns < 1e18).then(|| Nanos(ns.round() as u64))
}

/// Writes a time so that [`parse_duration`] reads the same one, in the longest unit that
/// divides it.
pub(super) fn write_duration(duration: Nanos) -> String {
    let (name, factor) = UNITS
        .iter()
        .find(|(_, factor)| duration.0 != 0 && duration.0.is_multiple_of(*factor))
        .unwrap_or(&("ns", 1));
    format!("{}{name}", duration.0 / factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_with_their_unit() {
        for (text, ns) in [
            ("250ms", 250_000_000),
            ("1.5 s", 1_500_000_000),
            ("2 min", 120_000_000_000),
            ("1h", 3_600_000_000_000),
            ("800us", 800_000),
            ("800 µs", 800_000),
            ("7ns", 7),
        ] {
            assert_eq!(parse_duration(text), Some(Nanos(ns)), "{text}");
        }
        for text in ["", "5", "ms", "-1s", "1 fortnight", "1e400s", "inf s", "s 5"] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }

    #[test]
    fn a_written_duration_reads_back() {
        for ns in
            [1, 999, 1_000, 1_500, 250_000_000, 1_000_000_000, 61_000_000_000, 7_200_000_000_000]
        {
            assert_eq!(parse_duration(&write_duration(Nanos(ns))), Some(Nanos(ns)));
        }
    }
}
