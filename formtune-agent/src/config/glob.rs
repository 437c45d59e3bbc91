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

#[cfg(test)]
mod tests {
    use super::matches;

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
