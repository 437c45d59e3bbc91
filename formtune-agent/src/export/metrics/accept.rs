//! Which form of the metrics a client wants: the header field `Accept` (RFC 9110, 12.5.1).

/// Form of `/metrics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Text, for everybody who does not ask for more.
    Text,
    /// Length-delimited messages, which alone hold native histograms.
    Protobuf,
}

impl Format {
    /// The form that the `Accept` fields of a request like best; text where they do not say,
    /// or ask for something that there is not: a reader with odd wishes can still read text.
    pub fn of<'a>(accepts: impl IntoIterator<Item = &'a str>) -> Self {
        let (mut text, mut protobuf) = (Liking::default(), Liking::default());
        for range in accepts.into_iter().flat_map(|accept| accept.split(',')) {
            let Some(range) = Range::parse(range) else { continue };
            text.meet(range.matches_text(), range.quality);
            protobuf.meet(range.matches_protobuf(), range.quality);
        }
        if protobuf.quality > text.quality { Self::Protobuf } else { Self::Text }
    }

    /// Its media type.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::Protobuf => {
                "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; \
                 encoding=delimited"
            }
        }
    }
}

/// How much a form is liked: what the most specific range that matches says, in thousandths.
#[derive(Default)]
struct Liking {
    specific: u8,
    quality: u16,
}

impl Liking {
    /// `specific` is 0 where the range does not match.
    fn meet(&mut self, specific: u8, quality: u16) {
        let better = (specific, quality) > (self.specific, self.quality);
        if specific > 0 && better {
            *self = Self { specific, quality };
        }
    }
}

/// One media range.
struct Range<'a> {
    media: String,
    parameters: Vec<(String, &'a str)>,
    quality: u16,
}

impl<'a> Range<'a> {
    /// `None` of what is not one.
    fn parse(text: &'a str) -> Option<Self> {
        let mut parts = text.split(';').map(str::trim);
        let media = parts.next().filter(|media| media.contains('/'))?.to_ascii_lowercase();
        let mut range = Self { media, parameters: Vec::new(), quality: 1_000 };
        for part in parts.filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=')?;
            let (name, value) = (name.trim().to_ascii_lowercase(), value.trim().trim_matches('"'));
            if name == "q" {
                let quality: f32 = value.parse().ok().filter(|q| (0.0..=1.0).contains(q))?;
                range.quality = (quality * 1_000.0).round() as u16;
            } else {
                range.parameters.push((name, value));
            }
        }
        Some(range)
    }

    fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(known, _)| known == name).map(|(_, value)| *value)
    }

    /// Whether a parameter has this value, or is not given.
    fn agrees(&self, name: &str, wanted: &str) -> bool {
        self.parameter(name).is_none_or(|value| value.eq_ignore_ascii_case(wanted))
    }

    fn matches_text(&self) -> u8 {
        match self.media.as_str() {
            "text/plain" => 3 * u8::from(self.agrees("version", "0.0.4")),
            "text/*" => 2,
            "*/*" => 1,
            _ => 0,
        }
    }

    fn matches_protobuf(&self) -> u8 {
        match self.media.as_str() {
            "application/vnd.google.protobuf" => {
                let ours = self.agrees("proto", "io.prometheus.client.MetricFamily")
                    && self.agrees("encoding", "delimited");
                3 * u8::from(ours)
            }
            "application/*" => 2,
            "*/*" => 1,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROTOBUF: &str = "application/vnd.google.protobuf;\
                            proto=io.prometheus.client.MetricFamily;encoding=delimited";

    #[test]
    fn servers_get_what_they_ask_for() {
        for accept in [
            // Prometheus 2.42 with native histograms, and 3.
            &format!(
                "{PROTOBUF},application/openmetrics-text;version=1.0.0;q=0.8,\
                 application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;\
                 q=0.5,*/*;q=0.1"
            ),
            &format!(
                "{PROTOBUF};escaping=allow-utf-8;q=0.6,application/openmetrics-text;\
                 version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
            ),
            PROTOBUF,
            "Application/Vnd.Google.Protobuf; Proto=\"io.prometheus.client.MetricFamily\"",
            &format!("{PROTOBUF}, text/plain;q=0.999"),
            &format!("*/*;q=0.1, {PROTOBUF};q=0.2"),
            "application/*",
        ] {
            assert_eq!(Format::of([accept]), Format::Protobuf, "{accept}");
        }
        assert_eq!(Format::of(["text/plain;q=0.1", PROTOBUF]), Format::Protobuf);
    }

    #[test]
    fn everybody_else_gets_text() {
        for accept in [
            "",
            "*/*",
            "text/html, */*;q=0.8",
            "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            &format!("{PROTOBUF};q=0"),
            &format!("{PROTOBUF};q=0, */*"),
            &format!("{PROTOBUF};q=0.5, text/plain"),
            &format!("{PROTOBUF}, text/plain"),
            "application/vnd.google.protobuf;proto=another.Message;encoding=delimited",
            "application/vnd.google.protobuf;encoding=text",
            &format!("{PROTOBUF};q=2"),
            &format!("{PROTOBUF};q=NaN"),
            &format!("{PROTOBUF};q"),
            "image/png",
            ";;;,,/,=",
        ] {
            assert_eq!(Format::of([accept]), Format::Text, "{accept}");
        }
        assert_eq!(Format::of([]), Format::Text);
    }
}
