//! Formats a line of the log. Pure: the time is passed as text, and nothing is written here.
//!
//! A line consists of a message and the fields of its record ([`log::kv`]). In text form, this is
//! `message key=value key="a value"`; in JSON, each field has its own key.

use std::borrow::Cow;
use std::fmt::{self, Display, Formatter};
use std::io::Write as _;
use std::time::Duration;

use log::Level;
use log::kv::{self, Key, Source, VisitSource, VisitValue};

use super::json::Object;

/// The parts of a line.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Line<'a> {
    pub(crate) time: &'a str,
    pub(crate) level: Level,
    /// The process that writes the line.
    pub(crate) pid: u32,
    pub(crate) target: &'a str,
    pub(crate) message: &'a str,
    pub(crate) fields: &'a Fields,
    /// Whether the message is output of an application process. In text form, such a message follows the fields:
    /// `slot=S pid=P | MESSAGE`.
    pub(crate) is_output: bool,
}

/// Placeholder for the time, which [`stamp`] overwrites.
pub(crate) const NO_TIME: &str = "0000-00-00T00:00:00.000Z";

/// Overwrites [`NO_TIME`] with a time, given as the time since 1970. Allocates nothing, so a signal handler may call
/// it.
pub(crate) fn stamp(since_1970: Duration, into: &mut [u8]) {
    let (days, second) = (since_1970.as_secs() / 86400, since_1970.as_secs() % 86400);
    // Years are counted from March, so that the leap day is the last day of a year. 400 years have 146097 days.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let millis = u64::from(since_1970.subsec_millis());
    let parts = [
        (0, 4, year),
        (5, 2, month),
        (8, 2, day),
        (11, 2, second / 3600),
        (14, 2, second / 60 % 60),
        (17, 2, second % 60),
        (20, 3, millis),
    ];
    for (at, digits, mut number) in parts {
        for place in (at..at + digits).rev() {
            if let Some(byte) = into.get_mut(place) {
                *byte = b'0' + u8::try_from(number % 10).unwrap_or(0);
            }
            number /= 10;
        }
    }
}

/// The fields of a line, in order. A field without a value (`None`) is left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fields(Vec<(String, Value)>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    /// A number or a boolean, which has the same form in text and JSON.
    Plain(String),
    Text(String),
}

/// Keys of a line in JSON that are not fields.
const RESERVED: [&str; 4] = ["time", "level", "target", "message"];
/// The highest integer up to which JSON readers represent all integers exactly.
const MAX_EXACT: u64 = 1 << 53;

impl Fields {
    pub(crate) fn of(source: &dyn Source) -> Self {
        let mut fields = Self::default();
        let _ = source.visit(&mut fields); // `Fields` returns no error
        fields
    }

    /// Returns the size of the fields in bytes, without separators.
    pub(crate) fn size(&self) -> usize {
        self.0.iter().map(|(key, Value::Plain(value) | Value::Text(value))| key.len() + value.len()).sum()
    }

    pub(crate) fn push(&mut self, key: &str, number: u64) {
        self.0.push((key.to_owned(), Value::Plain(number.to_string())));
    }
}

impl Display for Fields {
    /// Writes the fields as ` key=value key="a value"`, with a space before each field.
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(key, value)| match value {
            Value::Text(text) if needs_quotes(text) => write!(f, " {}={text:?}", key.escape_debug()),
            Value::Text(text) | Value::Plain(text) => write!(f, " {}={text}", key.escape_debug()),
        })
    }
}

impl<'kvs> VisitSource<'kvs> for Fields {
    fn visit_pair(&mut self, key: Key<'kvs>, value: kv::Value<'kvs>) -> Result<(), kv::Error> {
        let mut visited = Visited(None);
        value.visit(&mut visited)?;
        self.0.extend(visited.0.map(|value| (key.to_string(), value)));
        Ok(())
    }
}

struct Visited(Option<Value>);

impl Visited {
    fn plain(&mut self, value: impl Display) -> Result<(), kv::Error> {
        self.0 = Some(Value::Plain(value.to_string()));
        Ok(())
    }
}

impl VisitValue<'_> for Visited {
    fn visit_any(&mut self, value: kv::Value<'_>) -> Result<(), kv::Error> {
        self.0 = Some(Value::Text(value.to_string()));
        Ok(())
    }

    fn visit_null(&mut self) -> Result<(), kv::Error> {
        Ok(())
    }

    fn visit_u64(&mut self, value: u64) -> Result<(), kv::Error> {
        if value <= MAX_EXACT { self.plain(value) } else { self.visit_any(value.into()) }
    }

    fn visit_i64(&mut self, value: i64) -> Result<(), kv::Error> {
        if value.unsigned_abs() <= MAX_EXACT { self.plain(value) } else { self.visit_any(value.into()) }
    }

    fn visit_bool(&mut self, value: bool) -> Result<(), kv::Error> {
        self.plain(value)
    }
}

impl Line<'_> {
    pub(crate) fn write_text(&self, out: &mut Vec<u8>) {
        let Self { time, level, pid, message, fields, is_output, .. } = self;
        let _ = write!(out, "{time} {level:<5} [{pid}]"); // writing to a Vec cannot fail
        if is_ours(self.target) {
            // It may contain an error of the application, and that may contain what a client has sent.
            let _ = write!(out, " {}", one_line(message));
        } else if !is_output {
            let _ = write!(out, " {message}");
        }
        let _ = write!(out, "{fields}");
        if *is_output {
            let _ = write!(out, " | {message}");
        }
        out.push(b'\n');
    }

    /// Writes the line as JSON. The key `pid` contains the process that the line describes, if the line has a field
    /// with that name, and otherwise the process that writes the line.
    pub(crate) fn write_json(&self, out: &mut Vec<u8>) {
        let level = self.level.as_str().to_ascii_lowercase();
        let fields = &self.fields.0;
        let mut object = Object::begin(out);
        object.text("time", self.time);
        object.text("level", &level);
        if !fields.iter().any(|(key, _)| key == "pid") {
            object.plain("pid", self.pid);
        }
        object.text("target", self.target);
        object.text("message", self.message);
        for (index, (key, value)) in fields.iter().enumerate() {
            // An application may log any key, but each key must occur only once in the object. Of several fields with
            // the same key, the last one is written.
            if RESERVED.contains(&key.as_str()) || fields[index + 1..].iter().any(|(later, _)| later == key) {
                continue;
            }
            match value {
                Value::Plain(value) => object.plain(key, value),
                Value::Text(text) => object.text(key, text),
            }
        }
        object.end();
    }
}

/// Whether a module, which is also the target of its lines, belongs to Forkyard rather than to the application.
pub(super) fn is_ours(module: &str) -> bool {
    let below = module.strip_prefix(env!("CARGO_CRATE_NAME"));
    below.is_some_and(|below| below.is_empty() || below.starts_with("::"))
}

/// Escapes control characters.
fn one_line(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return text.into();
    }
    let escaped = |char: char| if char.is_control() { char.escape_debug().to_string() } else { char.to_string() };
    text.chars().map(escaped).collect::<String>().into()
}

/// Whether a value would be ambiguous as `key=value`, or contains characters that are not visible.
fn needs_quotes(text: &str) -> bool {
    let is_escaped = |char: char| !matches!(char, '\\' | '\'') && char.escape_debug().len() > 1;
    text.is_empty() || text.contains(|char: char| char.is_whitespace() || char == '=' || is_escaped(char))
}

#[cfg(test)]
mod tests {
    use log::kv::ToValue as _;
    use serde_json::Value as Json;

    use super::*;

    #[test]
    fn a_time_is_stamped_as_the_logger_writes_it() {
        for (seconds, millis, text) in [
            (0, 0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, 999, "2000-02-28T23:59:59.999Z"),
            (951_782_400, 7, "2000-02-29T00:00:00.007Z"),
            (1_796_054_399, 42, "2026-11-30T15:59:59.042Z"),
            (4_107_542_400, 0, "2100-03-01T00:00:00.000Z"),
        ] {
            let mut line = NO_TIME.as_bytes().to_vec();
            stamp(Duration::from_secs(seconds) + Duration::from_millis(millis), &mut line);
            assert_eq!(String::from_utf8_lossy(&line), text);
        }
        stamp(Duration::from_secs(1), &mut []);
    }

    fn write(message: &str, source: &dyn Source, is_output: bool) -> (String, Json) {
        let fields = &Fields::of(source);
        let (time, level) = ("2026-01-02T03:04:05.678Z", Level::Warn);
        let line = Line { time, level, pid: 7, target: "t", message, fields, is_output };
        let (mut text, mut json) = (Vec::new(), Vec::new());
        line.write_text(&mut text);
        line.write_json(&mut json);
        assert_eq!(json.iter().filter(|&&byte| byte == b'\n').count(), 1);
        (String::from_utf8(text).unwrap(), serde_json::from_slice(&json).unwrap())
    }

    #[test]
    fn fields_follow_the_message() {
        let in_flight = "GET /a\"b\n\u{1} 3ms";
        let fields: [(&str, kv::Value<'_>); 6] = [
            ("slot", 3.into()),
            ("pid", 41.into()),
            ("status", None::<i32>.to_value()),
            ("signal", "SEGV".into()),
            ("in_flight", in_flight.into()),
            ("is_last", false.into()),
        ];
        let (text, json) = write("worker died", &fields, false);
        let expected = r#"worker died slot=3 pid=41 signal=SEGV in_flight="GET /a\"b\n\u{1} 3ms" is_last=false"#;
        assert_eq!(text, format!("2026-01-02T03:04:05.678Z WARN  [7] {expected}\n"));
        assert_eq!(
            json,
            serde_json::json!({
                "time": "2026-01-02T03:04:05.678Z", "level": "warn", "target": "t", "message": "worker died",
                "slot": 3, "pid": 41, "signal": "SEGV", "in_flight": in_flight, "is_last": false,
            })
        );
        let (text, json) = write("slot=1 pid=2", &None::<(&str, &str)>, false);
        assert_eq!((&json["message"], &json["pid"], &json["slot"]), (&"slot=1 pid=2".into(), &7.into(), &Json::Null));
        assert!(text.ends_with("[7] slot=1 pid=2\n"), "{text}");
    }

    #[test]
    fn output_follows_its_fields() {
        let (text, json) = write("pid=3 level=error | slot=9", &[("slot", 1), ("pid", 2)], true);
        assert!(text.ends_with("WARN  [7] slot=1 pid=2 | pid=3 level=error | slot=9\n"), "{text}");
        assert_eq!(json["message"], "pid=3 level=error | slot=9");
        assert_eq!((&json["slot"], &json["pid"], &json["level"]), (&1.into(), &2.into(), &"warn".into()));
    }

    #[test]
    fn no_field_takes_the_place_of_another_key() {
        let fields = [("level", "x"), ("message", "y"), ("a", "1"), ("target", ""), ("a", "2")];
        let (text, json) = write("m", &fields, false);
        assert!(text.ends_with(" m level=x message=y a=1 target=\"\" a=2\n"), "{text}");
        assert_eq!((&json["level"], &json["message"], &json["a"]), (&"warn".into(), &"m".into(), &"2".into()));
    }

    #[test]
    fn no_text_of_a_client_forms_a_line_of_its_own() {
        let message = "a request failed: x\n2026-01-02T03:04:05.678Z WARN  [1] worker died\u{1b}[0m é";
        let fields = &Fields::of(&("a\nb", "a\u{202e}b"));
        let (time, level, target) = ("T", Level::Warn, concat!(env!("CARGO_CRATE_NAME"), "::worker"));
        let line = Line { time, level, pid: 7, target, message, fields, is_output: false };
        let mut text = Vec::new();
        line.write_text(&mut text);
        let expected =
            r#" a request failed: x\n2026-01-02T03:04:05.678Z WARN  [1] worker died\u{1b}[0m é a\nb="a\u{202e}b""#;
        assert_eq!(String::from_utf8(text).unwrap(), format!("T WARN  [7]{expected}\n"));
    }

    #[test]
    fn integers_that_json_readers_would_round_are_text() {
        let exact = 1_u64 << 53;
        let (_, json) = write("m", &[("a", exact), ("b", exact + 1)], false);
        assert_eq!((&json["a"], &json["b"]), (&exact.into(), &"9007199254740993".into()));
        let (_, json) = write("m", &[("a", i64::MIN)], false);
        assert_eq!(json["a"], "-9223372036854775808");
    }
}
