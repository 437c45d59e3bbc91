//! `formtune doctor`: is this node fit, and what is to be done.

use super::style::{Style, Tone};
use super::{GOOD, Global, OneLine, findings, print};
use crate::config;
use crate::doctor::{Check, Verdict, examine};
use serde::Serialize;
use std::fmt::Write;
use std::process::ExitCode;

/// Columns of verdict and name.
const VERDICT: usize = 10;
const NAME: usize = 9;

#[derive(Serialize)]
struct Json<'a> {
    findings: usize,
    checks: &'a [Check],
}

/// Looks and prints. 1 with findings.
///
/// # Errors
/// The configuration cannot be used.
pub fn run(global: &Global) -> anyhow::Result<ExitCode> {
    let config = config::load(global.config.as_deref())?;
    let uri = config.libvirt_uri.clone().unwrap_or_default();
    let checks = examine(&config, move || {
        eprintln!("formtune: waiting for libvirt at {} …", OneLine(uri));
    });
    let found = checks.iter().filter(|check| check.verdict == Verdict::Finding).count();
    if global.json {
        let json = Json { findings: found, checks: &checks };
        print(format_args!("{}\n", serde_json::to_string_pretty(&json)?))?;
    } else {
        let style = Style::of_stdout();
        print(style.finish(&render(&checks, style)))?;
    }
    Ok(if found == 0 { GOOD } else { findings() })
}

/// The whole text.
pub fn render(checks: &[Check], style: Style) -> String {
    let mut text = String::new();
    for check in checks {
        let (word, tone) = match check.verdict {
            Verdict::Ok => ("✓ ok", Tone::Good),
            Verdict::Note => ("· note", Tone::Notice),
            Verdict::Finding => ("✗ finding", Tone::Bad),
        };
        let pad = " ".repeat(VERDICT - word.chars().count());
        let verdict = style.paint(tone, word);
        let indent = VERDICT + 1 + NAME;
        let found = style.wrap(indent, &OneLine(&check.found).to_string());
        let _ = writeln!(text, "{verdict}{pad} {:NAME$}{found}", check.name);
        if let Some(remedy) = &check.remedy {
            let remedy = style.wrap(indent, &format!("→ {}", OneLine(remedy)));
            let _ = writeln!(text, "{:indent$}{remedy}", "");
        }
    }
    let count = checks.iter().filter(|check| check.verdict == Verdict::Finding).count();
    let _ = match count {
        0 => writeln!(text, "\nThis node is fit for formtune."),
        1 => writeln!(text, "\n1 finding."),
        n => writeln!(text, "\n{n} findings."),
    };
    text
}
