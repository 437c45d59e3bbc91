//! A parsed file whose every key and value still knows where it stood, so that an error
//! can name line and column; one shape for TOML (ours) and JSON (the guide's).

use super::ConfigError;
use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};

/// The text of a configuration file.
#[derive(Debug)]
pub(super) struct Source {
    pub path: PathBuf,
    pub text: String,
}

impl Source {
    /// Reads a file. Fails with one line that names it.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        match std::fs::read_to_string(path) {
            Ok(text) => Ok(Self { path: path.into(), text }),
            Err(source) => Err(ConfigError::Read { path: path.into(), source }),
        }
    }

    /// Line, and column in characters, of a byte offset of the text; both from 1.
    pub fn line_column(&self, offset: usize) -> (usize, usize) {
        let before = self.text.get(..offset).unwrap_or(&self.text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
        (line, column)
    }

    /// An error at a byte offset of the text.
    pub fn error(&self, offset: usize, what: impl fmt::Display) -> ConfigError {
        let (line, column) = self.line_column(offset);
        ConfigError::At { path: self.path.clone(), line, column, what: what.to_string() }
    }
}

/// A value and the byte offset at which it begins.
#[derive(Debug)]
pub(super) struct Node {
    pub offset: usize,
    pub value: Value,
}

/// What TOML and JSON have in common.
#[derive(Debug)]
pub(super) enum Value {
    Null,
    Bool,
    Integer(i64),
    Float(f64),
    String(String),
    /// TOML's date or time, which no key of ours takes.
    Datetime,
    Array(Vec<Node>),
    Table(Vec<Entry>),
}

/// A key and its value.
#[derive(Debug)]
pub(super) struct Entry {
    pub key: String,
    pub key_offset: usize,
    pub node: Node,
}

impl Value {
    /// With its article, as error messages want it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool => "a boolean",
            Self::Integer(_) => "an integer",
            Self::Float(_) => "a number",
            Self::String(_) => "a string",
            Self::Datetime => "a date",
            Self::Array(_) => "a list",
            Self::Table(_) => "a table",
        }
    }
}

/// Parses TOML.
pub(super) fn parse_toml(source: &Source) -> Result<Node, ConfigError> {
    let table = toml::de::DeTable::parse(&source.text).map_err(|error| {
        let offset = error.span().map_or(0, |span| span.start);
        source.error(offset, one_line(error.message()))
    })?;
    Ok(Node { offset: 0, value: Value::Table(toml_entries(source, table.into_inner())?) })
}

fn toml_entries(source: &Source, table: toml::de::DeTable<'_>) -> Result<Vec<Entry>, ConfigError> {
    let mut entries = Vec::with_capacity(table.len());
    for (key, value) in table {
        let key_offset = key.span().start;
        let node = toml_node(source, value)?;
        entries.push(Entry { key: key.into_inner().into_owned(), key_offset, node });
    }
    // Reported in the order of the file, whatever order the map keeps.
    entries.sort_by_key(|entry| entry.key_offset);
    Ok(entries)
}

fn toml_node(
    source: &Source,
    value: toml::Spanned<toml::de::DeValue<'_>>,
) -> Result<Node, ConfigError> {
    use toml::de::DeValue;
    let offset = value.span().start;
    let value = match value.into_inner() {
        DeValue::String(string) => Value::String(string.into_owned()),
        DeValue::Integer(integer) => match i64::from_str_radix(integer.as_str(), integer.radix()) {
            Ok(integer) => Value::Integer(integer),
            Err(_) => return Err(source.error(offset, "integer is out of range")),
        },
        DeValue::Float(float) => match float.as_str().parse::<f64>() {
            Ok(float) => Value::Float(float),
            Err(_) => return Err(source.error(offset, "number is out of range")),
        },
        DeValue::Boolean(_) => Value::Bool,
        DeValue::Datetime(_) => Value::Datetime,
        DeValue::Array(array) => Value::Array(
            array.into_iter().map(|node| toml_node(source, node)).collect::<Result<_, _>>()?,
        ),
        DeValue::Table(table) => Value::Table(toml_entries(source, table)?),
    };
    Ok(Node { offset, value })
}

/// Parses JSON.
pub(super) fn parse_json(source: &Source) -> Result<Node, ConfigError> {
    let raw: &RawValue =
        serde_json::from_str(&source.text).map_err(|error| json_error(source, 0, &error))?;
    json_node(source, raw)
}

/// Where a piece of the text begins. Both are slices of one allocation, so the difference
/// of their addresses is the offset.
fn offset_in(source: &Source, piece: &str) -> usize {
    (piece.as_ptr() as usize).saturating_sub(source.text.as_ptr() as usize)
}

fn json_error(source: &Source, base: usize, error: &serde_json::Error) -> ConfigError {
    let piece = &source.text[base..];
    let line_start: usize =
        piece.split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum();
    let mut offset = (base + line_start + error.column().saturating_sub(1)).min(source.text.len());
    while !source.text.is_char_boundary(offset) {
        offset -= 1;
    }
    // serde_json appends " at line N column M", which the prefix says already.
    let message = error.to_string();
    let message = message.split(" at line ").next().unwrap_or(&message);
    source.error(offset, one_line(message))
}

fn json_node(source: &Source, raw: &RawValue) -> Result<Node, ConfigError> {
    let text = raw.get();
    let offset = offset_in(source, text);
    let fail = |error: serde_json::Error| json_error(source, offset, &error);
    let value = match text.as_bytes().first() {
        Some(b'{') => {
            let Entries(raw) = serde_json::from_str(text).map_err(fail)?;
            let mut entries: Vec<Entry> = Vec::with_capacity(raw.len());
            for (key, value) in raw {
                // A key with escapes is not a slice of the text; its value stands right after it.
                let key_offset = match &key {
                    Cow::Borrowed(key) => offset_in(source, key).saturating_sub(1),
                    Cow::Owned(_) => offset_in(source, value.get()),
                };
                if entries.iter().any(|entry| entry.key == key) {
                    return Err(source.error(key_offset, format_args!("duplicate key `{key}`")));
                }
                entries.push(Entry {
                    key: key.into_owned(),
                    key_offset,
                    node: json_node(source, value)?,
                });
            }
            Value::Table(entries)
        }
        Some(b'[') => {
            let raw: Vec<&RawValue> = serde_json::from_str(text).map_err(fail)?;
            Value::Array(
                raw.into_iter().map(|raw| json_node(source, raw)).collect::<Result<_, _>>()?,
            )
        }
        _ => match serde_json::from_str(text).map_err(fail)? {
            serde_json::Value::Bool(_) => Value::Bool,
            serde_json::Value::String(string) => Value::String(string),
            serde_json::Value::Number(number) => match number.as_i64() {
                Some(integer) => Value::Integer(integer),
                None => Value::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            _ => Value::Null,
        },
    };
    Ok(Node { offset, value })
}

/// An object's entries in order, borrowed from the text.
struct Entries<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Entries<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Ordered;
        impl<'de> Visitor<'de> for Ordered {
            type Value = Entries<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(Key(key)) = map.next_key()? {
                    entries.push((key, map.next_value()?));
                }
                Ok(Entries(entries))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<Self::Value, A::Error> {
                Err(de::Error::custom("expected an object"))
            }
        }
        deserializer.deserialize_map(Ordered)
    }
}

/// A key, borrowed where it has no escapes (`Cow`'s own `Deserialize` always copies).
struct Key<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Key<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }
            fn visit_borrowed_str<E>(self, key: &'de str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Borrowed(key)))
            }
            fn visit_str<E>(self, key: &str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Owned(key.to_owned())))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// Parser messages may span lines; a report is one.
fn one_line(message: &str) -> String {
    message
        .split('\n')
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join(", ")
}
