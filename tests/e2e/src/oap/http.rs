//! HTTP as OAPs and Envoy are asked: one connection for each request.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ureq::http::Response;
use ureq::{Agent, Body, Error};

const CONNECTS_WITHIN: Duration = Duration::from_secs(2);
const ANSWERS_WITHIN: Duration = Duration::from_secs(15);

/// The body of the answer to a GET.
///
/// # Errors
/// When the server does not answer 200.
pub fn get(server: SocketAddr, path: &str) -> Result<String> {
    body(server, agent().get(url(server, path)).call())
}

/// The body of the answer to a POST of JSON.
///
/// # Errors
/// When the server does not answer 200.
pub fn post_json(server: SocketAddr, path: &str, body: &str) -> Result<String> {
    let request = agent()
        .post(url(server, path))
        .content_type("application/json");
    self::body(server, request.send(body))
}

/// Not kept for the next request, and so without connections that are kept open.
fn agent() -> Agent {
    Agent::config_builder()
        .timeout_connect(Some(CONNECTS_WITHIN))
        .timeout_global(Some(ANSWERS_WITHIN))
        .http_status_as_error(false)
        .proxy(None)
        .build()
        .into()
}

fn url(server: SocketAddr, path: &str) -> String {
    format!("http://{server}{path}")
}

fn body(server: SocketAddr, answer: Result<Response<Body>, Error>) -> Result<String> {
    let mut answer = answer.with_context(|| format!("{server} does not answer HTTP"))?;
    let body = answer.body_mut().with_config().limit(u64::MAX);
    let text = body
        .read_to_string()
        .with_context(|| format!("the answer of {server} breaks off"))?;
    let status = answer.status();
    ensure!(status == 200, "{server} answers {status}: {text}");
    Ok(text)
}
