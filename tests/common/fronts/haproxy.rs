//! Configures HAProxy in the foreground, with `global` and `defaults` sections as in Debian's configuration.

use std::process::Command;

use super::{Place, configuration, daemon};

pub(super) fn command(place: &Place<'_>) -> Command {
    let snippet = &place.snippet;
    let text = format!(
        "global\n    maxconn 256\n\ndefaults\n    mode http\n    timeout connect 5s\n    timeout client 60s\n    \
         timeout server 60s\n\n{snippet}"
    );
    let mut command = daemon("haproxy");
    command.arg("-db").arg("-f").arg(configuration(place, &text));
    command
}
