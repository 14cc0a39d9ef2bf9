//! What the operator at the terminal is told outside the log: the banner, the moment of readiness, and the one
//! line of an error. It all goes to standard error, and to the log if that is a file; if the log is JSON, there alone, or else its
//! reader would stumble.

use std::fmt::Display;
use std::time::Duration;

use log::Level;

use crate::config::{Config, format_size};
use crate::logging;
use crate::net::listen::Listener;

/// Says what is about to run.
pub(crate) fn show(config: &Config, listeners: &[Listener], program: Option<&str>) {
    let mut text = format!("forkyard {}, pid {}\n", env!("CARGO_PKG_VERSION"), std::process::id());
    for listener in listeners {
        text += &format!("  bind     {listener}\n");
    }
    if let Some(program) = program {
        text += &format!("  run      {program}, on its standard input\n");
    }
    let threads = match (program, config.threads) {
        (Some(_), _) => String::new(),
        (None, 1) => ", 1 thread each for blocking functions".to_owned(),
        (None, threads) => format!(", {threads} threads each for blocking functions"),
    };
    text += &format!("  workers  {}{threads}\n", config.workers);
    text += &match (config.cache.bytes, &config.cache.file) {
        (0, _) if program.is_some() => String::new(),
        (0, _) => "  cache    none\n".to_owned(),
        (bytes, None) => format!("  cache    {}, shared\n", format_size(bytes)),
        (bytes, Some(file)) => format!("  cache    {}, shared, in {}\n", format_size(bytes), file.display()),
    };
    write(&text);
}

/// Says that all workers serve.
pub(crate) fn ready(after: Duration) {
    write(&format!("ready in {} ms\n", after.as_millis()));
}

/// Says to a running master that this build can take its place; true, as nothing failed.
pub(crate) fn can_take_over() -> bool {
    // Wherever the log goes: it is for the master that asks.
    logging::to_standard_error(format!("{}\n", crate::upgrade::password()).as_bytes());
    true
}

/// Says what went wrong, before there is a log.
pub(crate) fn complain(error: &dyn Display) {
    say(Level::Error, "", error);
}

/// Says what `check` has found: an error, or a warning.
pub(crate) fn report(level: Level, finding: &dyn Display) {
    say(level, if level == Level::Error { "error: " } else { "warning: " }, finding);
}

fn say(level: Level, prefix: &str, text: &dyn Display) {
    if logging::is_json() || logging::is_file() {
        log::log!(level, "{text}");
    }
    if !logging::is_json() || logging::is_file() {
        logging::to_standard_error(format!("forkyard: {prefix}{text}\n").as_bytes());
        logging::finish(); // it may be the last word
    }
}

fn write(text: &str) {
    if logging::is_json() || logging::is_file() {
        text.lines().for_each(|line| log::info!("{}", line.trim()));
    }
    if !logging::is_json() {
        logging::to_standard_error(text.as_bytes());
    }
}
