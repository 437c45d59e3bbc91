//! The README's table of kernels beside what the tests have just seen: which methods are in use
//! on which kernel must be the same. Figures vary from run to run, and so do the releases of a
//! series.

use super::Count;
use crate::sh;
use anyhow::{Context, Result};

/// Compares every row of a table (as `kernels` prints it) with the README's row of that kernel.
pub fn compare(table: &str) -> Result<Count> {
    let path = sh::root().join("README.md");
    let readme = std::fs::read_to_string(&path)
        .with_context(|| format!("failed to read {}", path.display()))?;
    let mut count = Count::default();
    for row in rows(table) {
        match differs(row, &readme) {
            Compared::Same => count.passed += 1,
            Compared::Other(theirs) => {
                count.failed += 1;
                count.notes.push(format!(
                    "the README's table has other methods for a kernel:\n  {row}\n  {theirs}"
                ));
            }
            // The newest series becomes another one without anybody's doing.
            Compared::Unknown => {
                count.notes.push(format!("the README's table does not have this kernel: {row}"));
            }
        }
    }
    Ok(count)
}

/// What the README says of a kernel.
#[derive(Debug, PartialEq, Eq)]
enum Compared<'a> {
    Same,
    Other(&'a str),
    Unknown,
}

fn differs<'a>(row: &str, readme: &'a str) -> Compared<'a> {
    match rows(readme).find(|theirs| series(theirs) == series(row)) {
        None => Compared::Unknown,
        Some(theirs) if methods(theirs) == methods(row) => Compared::Same,
        Some(theirs) => Compared::Other(theirs),
    }
}

/// Rows that begin with a kernel's release.
fn rows(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| series(line).is_some())
}

/// `(6, 12)` of `| 6.12.117+deb13-cloud-amd64 | …`.
fn series(row: &str) -> Option<(u32, u32)> {
    let mut numbers = row.strip_prefix("| ")?.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The cells behind the kernel's, without figures.
fn methods(row: &str) -> Vec<String> {
    let cells = row.trim().trim_matches('|').split('|').skip(1);
    cells.map(|cell| cell.trim().replace(|c: char| c.is_ascii_digit() || c == '.', "")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_count_and_figures_do_not() {
        let readme = "| kernel | acts | taps by |\n| --- | --- | --- |\n\
            | 6.1.0-50-cloud-amd64 | 3.99 | yes, clsact |\n| 6.12, natively | yes | yes, tcx |\n";
        let row = "| 6.1.0-51-cloud-amd64 | 4.02 | yes, clsact |";
        assert_eq!(differs(row, readme), Compared::Same);
        for other in
            ["| 6.1.0 | 4.02 | yes, tcx |", "| 6.1.0 | **no** | yes, clsact |", "| 6.1.0 | 4.02 |"]
        {
            assert!(matches!(differs(other, readme), Compared::Other(_)), "{other}");
        }
        assert_eq!(differs("| 6.12.1 | yes | yes, tcx |", readme), Compared::Same);
        assert_eq!(differs("| 6.11.1 | yes | yes, tcx |", readme), Compared::Unknown);
        assert_eq!(rows(readme).count(), 2);
    }
}
