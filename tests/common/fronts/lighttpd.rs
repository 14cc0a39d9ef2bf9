//! lighttpd: one process, all its files in the folder.

use std::process::Command;

use super::{Place, configuration, daemon};

pub(super) fn command(place: &Place<'_>) -> Command {
    let Place { folder, port, snippet } = place;
    let folder = folder.display();
    let text = format!(
        "server.document-root = \"{folder}\"
         server.upload-dirs = (\"{folder}\")
         server.errorlog = \"{folder}/error.log\"
         server.breakagelog = \"{folder}/application.log\"
         server.max-keep-alive-requests = 10000
         server.bind = \"127.0.0.1\"
         server.port = {port}
         server.modules = ()\n{snippet}"
    );
    let mut command = daemon("lighttpd");
    command.args(["-D", "-f"]).arg(configuration(place, &text));
    command
}
