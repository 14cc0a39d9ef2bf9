//! Prints messages for the operator outside the log: the banner, `ready in N ms`, and errors. These messages go to
//! standard error, and also to the log if the log is a file. If the log is JSON, they go only to the log, so that
//! standard error can be parsed; but if the log is a file, errors go to standard error as well.

use std::fmt::Display;
use std::time::Duration;

use log::Level;

use crate::config::gateway::GatewayConfig;
use crate::config::{Config, format_size};
use crate::logging;
use crate::net::listen::Listener;

/// Prints the banner.
pub(crate) fn show(config: &Config, listeners: &[Listener], program: Option<&str>) {
    let mut text = format!("forkyard {}, pid {}\n", env!("CARGO_PKG_VERSION"), std::process::id());
    for listener in listeners {
        text += &format!("  bind     {listener}\n");
    }
    if let Some(program) = program {
        let how = if config.gateway.is_some() { "behind gateways" } else { "on its standard input" };
        text += &format!("  run      {program}, {how}\n");
    }
    let has_php_children = |gateway: &&GatewayConfig| gateway.php.is_some();
    let threads = match (program, config.threads) {
        (Some(_), _) => config.gateway.as_ref().filter(has_php_children).map_or_else(String::new, |gateway| {
            format!(", a php-cgi with children, which serve {} requests at a time", gateway.concurrency)
        }),
        (None, 1) => ", 1 thread each for blocking functions".to_owned(),
        (None, threads) => format!(", {threads} threads each for blocking functions"),
    };
    text += &format!("  workers  {}{threads}\n", config.workers);
    if let Some(gateway) = &config.gateway {
        text += &format!("  gateways {}\n", gateway.gateways);
    }
    text += &match (config.cache.bytes, &config.cache.file) {
        (0, _) if program.is_some() => String::new(),
        (0, _) => "  cache    none\n".to_owned(),
        (bytes, None) => format!("  cache    {}, shared\n", format_size(bytes)),
        (bytes, Some(file)) => format!("  cache    {}, shared, in {}\n", format_size(bytes), file.display()),
    };
    write(&text);
}

/// Reports that all workers are ready.
pub(crate) fn ready(after: Duration) {
    write(&format!("ready in {} ms\n", after.as_millis()));
}

/// Reports to a running master that this build can take over. Always returns true, because nothing has failed.
pub(crate) fn can_take_over() -> bool {
    // This line does not go to the log, because the master that started the check reads this process's standard error.
    logging::to_standard_error(format!("{}\n", crate::upgrade::password()).as_bytes());
    true
}

/// Reports an error, even before the log is open.
pub(crate) fn complain(error: &dyn Display) {
    print(Level::Error, "", error);
}

/// Reports a finding of `check`: an error or a warning.
pub(crate) fn report(level: Level, finding: &dyn Display) {
    print(level, if level == Level::Error { "error: " } else { "warning: " }, finding);
}

fn print(level: Level, prefix: &str, text: &dyn Display) {
    if logging::is_json() || logging::is_file() {
        log::log!(level, "{text}");
    }
    if !logging::is_json() || logging::is_file() {
        logging::to_standard_error(format!("forkyard: {prefix}{text}\n").as_bytes());
        logging::finish(); // the process may exit now
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
