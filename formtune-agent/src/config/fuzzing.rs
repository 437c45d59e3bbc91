//! For the fuzz targets (`fuzz/`) only: the configuration file and the guide's.

use super::document::Source;
use super::{Config, ConfigError, file, guide, show};

/// The file as TOML, and as the guide's JSON.
///
/// # Panics
/// When a reader does, an error is not one line, or what was read is not what is shown.
pub fn config(text: &str) {
    // Without the key that names another file, which would be read.
    let text = text.replace("guide", "giude");
    let source = Source { path: "/nowhere/formtune.toml".into(), text };
    let base = Config::default().policy.classes.into_values().next();
    if let Some(base) = base
        && let Err(error) = guide::read(&source, &base)
    {
        one_line(&error);
    }
    match file::read(&source) {
        Ok(config) => {
            let shown = Source { path: source.path, text: show::toml(&config) };
            let again = file::read(&shown).expect("what is shown can be read");
            assert_eq!(again.policy, config.policy);
            assert_eq!(again.sense, config.sense);
        }
        Err(error) => one_line(&error),
    }
}

fn one_line(error: &ConfigError) {
    assert_eq!(error.to_string().lines().count(), 1, "{error}");
}
