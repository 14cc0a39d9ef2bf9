//! An application that serves the three roles of FastCGI.
//!
//! - A responder counts the bytes of the request's body.
//! - An authorizer admits `/?user=NAME`, and passes that name to the web server.
//! - A filter converts the file that the web server sends to upper case.
//!
//! `cargo run --release --example roles -- --bind fastcgi:unix:/run/roles.sock`

use std::io::{self, Read as _};
use std::process::ExitCode;

use forkyard::http::{HeaderValue, Request, Response, StatusCode};
use forkyard::{AppStatus, Body, FilterData, Role};

fn main() -> ExitCode {
    forkyard::run(|_cx| forkyard::blocking(answer))
}

fn answer(request: Request<Body>) -> Response<Body> {
    let answer = match Role::of(request.extensions()) {
        Role::Authorizer => Ok(decide(&request)),
        Role::Filter => filter(request),
        _ => count(request),
    };
    answer.unwrap_or_else(|error| {
        log::warn!("{error}");
        let mut response = Response::new(Body::from(format!("{error}\n")));
        *response.status_mut() = StatusCode::BAD_REQUEST;
        response.extensions_mut().insert(AppStatus(1));
        response
    })
}

fn count(request: Request<Body>) -> io::Result<Response<Body>> {
    let count = io::copy(&mut request.into_body().reader(), &mut io::sink())?;
    Ok(Response::new(Body::from(format!("{count} bytes\n"))))
}

fn decide(request: &Request<Body>) -> Response<Body> {
    let user = request.uri().query().and_then(|query| query.strip_prefix("user="));
    let mut response = Response::new(Body::empty());
    match user.and_then(|user| HeaderValue::from_str(user).ok()) {
        Some(user) => {
            response.headers_mut().insert("variable-remote_user", user);
        }
        None => *response.status_mut() = StatusCode::FORBIDDEN,
    }
    response
}

fn filter(request: Request<Body>) -> io::Result<Response<Body>> {
    if request.uri().path() == "/cached" {
        return Ok(Response::new(Body::from("the file was not read\n")));
    }
    let data = request.extensions().get::<FilterData>().and_then(FilterData::take);
    drop(request); // the body precedes the file and is not needed
    let mut text = Vec::new();
    data.unwrap_or_default().reader().read_to_end(&mut text)?;
    text.make_ascii_uppercase();
    Ok(Response::new(Body::from(text)))
}
