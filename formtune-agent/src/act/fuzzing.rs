//! For the fuzz targets (`fuzz/`) only: the reader of the journal.

use super::record::{Record, encode, replay};

/// A journal as it lies on disk; lines that begin with `+` get the checksum that they would
/// need, which no search would find.
///
/// # Panics
/// When the reader does, or what it read is not what it would write.
pub fn journal(data: &[u8]) {
    let found = replay(&with_checksums(data), "boot");
    for (key, entry) in found.entries {
        assert_eq!(key, entry.key());
        for value in [entry.original, entry.to, 0, u64::MAX] {
            entry.verdict(value, found.damage.is_some());
        }
        // As a new journal would begin.
        let mut written = encode(0, "boot", Record::HEADER).expect("a constant");
        let Ok(line) = encode(1, "boot", Record::Intent { entry: entry.clone() }) else { continue };
        written.push_str(&line);
        let again = replay(written.as_bytes(), "boot");
        assert_eq!(again.damage, None);
        assert_eq!(again.entries.get(&key), Some(&entry));
    }
}

fn with_checksums(data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in data.split_inclusive(|byte| *byte == b'\n') {
        match line {
            [b'+', json @ ..] => {
                let json_only = json.strip_suffix(b"\n").unwrap_or(json);
                bytes.extend(format!("{:08x} ", crc32fast::hash(json_only)).into_bytes());
                bytes.extend(json);
            }
            line => bytes.extend(line),
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So that the search begins with journals, not with damage.
    #[test]
    fn the_first_inputs_are_journals() {
        let seeds = [
            (include_bytes!("../../../fuzz/seeds/journal/changed").as_slice(), 151),
            (include_bytes!("../../../fuzz/seeds/journal/closed").as_slice(), 0),
        ];
        for (seed, to) in seeds {
            let found = replay(&with_checksums(seed), "boot");
            assert_eq!(found.damage, None);
            assert!(found.entries.values().map(|entry| entry.to).eq((to > 0).then_some(to)));
            journal(seed);
        }
    }
}
