//! Drives a real browser, headless Chromium, over a pair of pipes with the DevTools protocol. Each message is JSON followed by a zero byte.

#![allow(dead_code, reason = "each test binary uses only a part of this module")]
#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

use std::io::Write as _;
use std::process::{Child, ChildStdin, Command, Stdio};

use serde_json::{Value, json};

use super::wait_until;
use crate::common::limit::Pipe;

/// A browser with one page.
pub(crate) struct Browser {
    process: Child,
    to: ChildStdin,
    from: Pipe,
    last_id: u64,
    session: Option<String>,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// Starts the browser. Each page runs `script` before its own scripts.
    pub(crate) fn start(script: &str) -> Self {
        let profile = tempfile::tempdir().unwrap();
        // Chromium uses descriptors 3 and 4 for DevTools. Its sandbox is off, because it works neither as root nor in containers.
        let shell = "exec chromium \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1";
        let mut process = Command::new("sh")
            .args(["-c", shell, "sh", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
            .args(["--remote-debugging-pipe", "--no-first-run", "--disable-background-networking"])
            .args(["--disable-component-update", "--disable-sync", "--proxy-server=direct://"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .env("HOME", profile.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the shell starts");
        let (to, from) = (process.stdin.take().unwrap(), Pipe::of(process.stdout.take().unwrap()));
        let mut browser = Self { process, to, from, last_id: 0, session: None, _profile: profile };
        let page = browser.call("Target.createTarget", json!({"url": "about:blank"}))["targetId"].clone();
        let session = browser.call("Target.attachToTarget", json!({"targetId": page, "flatten": true}));
        browser.session = session["sessionId"].as_str().map(str::to_owned);
        browser.call("Page.enable", json!({}));
        browser.call("Page.addScriptToEvaluateOnNewDocument", json!({"source": script}));
        browser
    }

    pub(crate) fn open(&mut self, url: &str) {
        let answer = self.call("Page.navigate", json!({"url": url}));
        assert!(answer["errorText"].is_null(), "{url}: {answer}");
    }

    /// Returns the value of a JavaScript expression in the page, or null while the page cannot evaluate the expression.
    pub(crate) fn evaluate(&mut self, expression: &str) -> Value {
        let mut answer = self.call("Runtime.evaluate", json!({"expression": expression, "returnByValue": true}));
        answer["result"]["value"].take()
    }

    /// Waits until an expression is true in the page.
    pub(crate) fn wait_for(&mut self, expression: &str) {
        wait_until(&format!("{expression} in the page"), || {
            (self.evaluate(expression) == Value::Bool(true)).then_some(())
        });
    }

    fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.last_id += 1;
        let mut message = json!({"id": self.last_id, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        self.to.write_all(format!("{message}\0").as_bytes()).expect("the browser is running (the package `chromium`)");
        loop {
            let mut bytes = self.from.until(0, &format!("the browser's answer to {method}"));
            bytes.pop().expect("the browser is running (the package `chromium`)");
            let mut said: Value = serde_json::from_slice(&bytes).expect("the message is JSON");
            // Other messages are events, which match no request.
            if said["id"] == self.last_id {
                assert!(said["error"].is_null(), "{method}: {said}");
                return said["result"].take();
            }
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.to.write_all(b"{\"id\":0,\"method\":\"Browser.close\"}\0");
        // A browser that does not read the close command exits at the end of the pipe.
        if !std::thread::panicking() {
            wait_until("the browser has exited", || self.process.try_wait().ok().flatten());
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
