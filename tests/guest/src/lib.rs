//! The lines that a guest prints and its host reads: one per report interval. Both sides
//! share this file, so they cannot drift. It holds no load and reads no clock.
//!
//! Each line opens with a line's kind and is made of `key=value` words, so that a person
//! can follow a console as well:
//!
//! ```text
//! victim at_us=12000345 count=200 p50_us=1050 p99_us=1310 response=1050:120,1310:80
//! neighbour at_us=12000345 iterations=81234
//! ```

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use std::fmt;

/// Significant digits of every histogram here: values are kept to within 1 %.
const DIGITS: u8 = 2;

/// An empty histogram of microseconds.
pub fn histogram_us() -> Histogram<u64> {
    let mut histogram = Histogram::new(DIGITS).expect("1 to 5 digits are allowed");
    histogram.auto(true);
    histogram
}

/// What one interval of a periodic task was like.
#[derive(Clone, Debug, PartialEq)]
pub struct VictimReport {
    /// End of the interval on the guest's monotonic clock (the host's, where it runs as a
    /// plain process), microseconds.
    pub at_us: u64,
    /// Response times that ended in the interval: completion − scheduled start, µs.
    pub response: Histogram<u64>,
    /// Wake-up delays: actual start − scheduled start, µs. Left out on a serial console,
    /// where every byte costs the guest an exit.
    pub wake: Option<Histogram<u64>>,
}

/// How much work a spinner has done since it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeighbourReport {
    /// When it was counted, on the guest's monotonic clock, microseconds.
    pub at_us: u64,
    /// Fixed pieces of work finished by all threads since the start.
    pub iterations: u64,
}

impl fmt::Display for VictimReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "victim at_us={} count={} p50_us={} p99_us={} response={}",
            self.at_us,
            self.response.len(),
            self.response.value_at_quantile(0.50),
            self.response.value_at_quantile(0.99),
            Counts(&self.response),
        )?;
        match &self.wake {
            Some(wake) => write!(f, " wake={}", Counts(wake)),
            None => Ok(()),
        }
    }
}

impl fmt::Display for NeighbourReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "neighbour at_us={} iterations={}", self.at_us, self.iterations)
    }
}

/// `value:count` pairs, ascending.
struct Counts<'a>(&'a Histogram<u64>);

impl fmt::Display for Counts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, value) in self.0.iter_recorded().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}:{}", value.value_iterated_to(), value.count_at_value())?;
        }
        Ok(())
    }
}

impl VictimReport {
    /// `None` for a line of another kind (kernel messages share the console).
    ///
    /// # Errors
    /// A line of this kind that is cut off or garbled.
    pub fn parse(line: &str) -> Result<Option<Self>> {
        let Some(words) = line.trim().strip_prefix("victim ") else { return Ok(None) };
        let report = Self {
            at_us: number(words, "at_us")?,
            response: counts(words, "response")?,
            wake: words.contains(" wake=").then(|| counts(words, "wake")).transpose()?,
        };
        let count = number(words, "count")?;
        if report.response.len() != count {
            bail!("{} response times in a line that announces {count}", report.response.len());
        }
        Ok(Some(report))
    }
}

impl NeighbourReport {
    /// `None` for a line of another kind.
    ///
    /// # Errors
    /// A line of this kind that is cut off or garbled.
    pub fn parse(line: &str) -> Result<Option<Self>> {
        let Some(words) = line.trim().strip_prefix("neighbour ") else { return Ok(None) };
        let report =
            Self { at_us: number(words, "at_us")?, iterations: number(words, "iterations")? };
        Ok(Some(report))
    }
}

fn word<'a>(words: &'a str, key: &str) -> Result<&'a str> {
    words
        .split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        .with_context(|| format!("no {key}= in {words:?}"))
}

fn number(words: &str, key: &str) -> Result<u64> {
    word(words, key)?.parse().with_context(|| format!("{key}= is no number in {words:?}"))
}

fn counts(words: &str, key: &str) -> Result<Histogram<u64>> {
    let mut histogram = histogram_us();
    for pair in word(words, key)?.split(',').filter(|pair| !pair.is_empty()) {
        let parsed = pair.split_once(':').and_then(|(value, count)| {
            Some((value.parse::<u64>().ok()?, count.parse::<u64>().ok()?))
        });
        let Some((value, count)) = parsed else { bail!("{pair:?} in {key}= is no value:count") };
        histogram.record_n(value, count).context("histogram")?;
    }
    Ok(histogram)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn victim_line_survives_the_console() {
        let mut report = VictimReport { at_us: 12_000_345, response: histogram_us(), wake: None };
        for value in [3, 99, 1_050, 1_051, 7_777, 123_456] {
            report.response.record(value).unwrap();
        }
        let mut wake = histogram_us();
        wake.record_n(60, 200).unwrap();
        report.wake = Some(wake);
        let line = format!("{report}\r");
        let read = VictimReport::parse(&line).unwrap().unwrap();
        assert_eq!(read.at_us, report.at_us);
        assert_eq!(read.response.len(), 6);
        assert_eq!(read.wake.as_ref().unwrap().len(), 200);
        // A bucket's highest value stays in its bucket, so a second trip changes nothing.
        assert_eq!(format!("{read}\r"), line);
        assert_eq!(read.response.value_at_quantile(0.99), report.response.value_at_quantile(0.99));
    }

    #[test]
    fn empty_interval_is_a_line_too() {
        let report = VictimReport { at_us: 1, response: histogram_us(), wake: None };
        assert_eq!(VictimReport::parse(&report.to_string()).unwrap(), Some(report));
    }

    #[test]
    fn neighbour_line_survives_the_console() {
        let report = NeighbourReport { at_us: 5, iterations: 77 };
        assert_eq!(NeighbourReport::parse(&report.to_string()).unwrap(), Some(report));
    }

    #[test]
    fn other_lines_are_not_ours_and_cut_lines_are_errors() {
        assert_eq!(NeighbourReport::parse("[    0.1] Linux version 6.1").unwrap(), None);
        assert!(NeighbourReport::parse("neighbour at_us=5 itera").is_err());
        assert!(VictimReport::parse("victim at_us=5 count=2 response=10:1 wake=1:1").is_err());
        assert!(VictimReport::parse("victim at_us=5 count=2 response=10:2,1").is_err());
    }
}
