//! Names with wildcards.

/// Whether `name` matches a pattern in which `*` stands for any characters and `?` for one.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let name: Vec<char> = name.chars().collect();
    let (mut p, mut n) = (0, 0);
    // The last `*` seen and how much of the name it has taken; only that one needs retrying.
    let mut star = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(&c) if c == '?' || c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    p = at + 1;
                    n = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

/// For each number of characters of `name`, from 0 to all, whether so many from its beginning
/// match: one pass, however many wildcards there are.
pub(crate) fn matching_prefixes(
    pattern: impl Iterator<Item = char>,
    name: impl Iterator<Item = char>,
) -> Vec<bool> {
    let pattern: Vec<char> = pattern.collect();
    // Places in the pattern that what was read so far can have led to.
    let mut at = vec![false; pattern.len() + 1];
    at[0] = true;
    let skip_stars = |at: &mut Vec<bool>| {
        for (p, c) in pattern.iter().enumerate() {
            at[p + 1] |= at[p] && *c == '*';
        }
    };
    skip_stars(&mut at);
    let mut matching = vec![at[pattern.len()]];
    for read in name {
        let mut next = vec![false; pattern.len() + 1];
        for (p, c) in pattern.iter().enumerate() {
            match c {
                '*' => next[p] |= at[p],
                '?' => next[p + 1] |= at[p],
                c => next[p + 1] |= at[p] && *c == read,
            }
        }
        skip_stars(&mut next);
        matching.push(next[pattern.len()]);
        at = next;
    }
    matching
}

#[cfg(test)]
mod tests {
    use super::{matches, matching_prefixes};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn prefixes_match_as_they_do_alone(pattern in "[ab*?]{0,6}", name in "[abc]{0,8}") {
            let all = matching_prefixes(pattern.chars(), name.chars());
            let alone: Vec<bool> = (0..=name.len()).map(|n| matches(&pattern, &name[..n])).collect();
            prop_assert_eq!(all, alone);
        }
    }

    #[test]
    fn wildcards_stand_for_any_characters() {
        for (glob, name) in [
            ("", ""),
            ("*", ""),
            ("*", "web-1"),
            ("web-*", "web-"),
            ("web-?", "web-1"),
            ("*-*-b", "a-b-b-b"),
            ("a*b*c", "a1b2b3c"),
            ("?é", "ué"),
        ] {
            assert!(matches(glob, name), "{glob} {name}");
        }
        for (glob, name) in
            [("", "a"), ("?", ""), ("web-?", "web-10"), ("a*b", "abc"), ("Web", "web")]
        {
            assert!(!matches(glob, name), "{glob} {name}");
        }
    }
}
