//! What an OAP has received, by its own query API.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::http;

/// More rows than any run makes.
const ALL_ROWS: u32 = 100_000;

/// Numbers of segments by the service that made them.
pub type Segments = BTreeMap<String, BTreeSet<u32>>;

/// The server's version.
///
/// # Errors
/// When it does not answer.
pub fn version(oap: SocketAddr) -> Result<String> {
    let data = query(oap, "{version}", &json!({}))?;
    Ok(data["version"].to_string())
}

/// The numbered segments that this OAP has stored.
///
/// # Errors
/// When it does not answer as expected.
pub fn segments(oap: SocketAddr) -> Result<Segments> {
    const QUERY: &str = "query($condition: TraceQueryCondition) {
        queryBasicTraces(condition: $condition) { traces { endpointNames } } }";
    let condition = json!({
        "queryDuration": ever(), "paging": page(), "traceState": "ALL", "queryOrder": "BY_START_TIME",
    });
    let data = query(oap, QUERY, &json!({ "condition": condition }))?;
    let mut segments = Segments::new();
    for trace in rows(&data, "/queryBasicTraces/traces")? {
        let name = trace["endpointNames"][0].as_str().unwrap_or_default();
        let (service, number) = numbered(name)?;
        segments.entry(service).or_default().insert(number);
    }
    Ok(segments)
}

/// The numbers of the requests whose access logs this OAP has stored.
///
/// # Errors
/// When it does not answer as expected.
pub fn access_logs(oap: SocketAddr) -> Result<BTreeSet<u32>> {
    const QUERY: &str = "query($condition: LogQueryCondition) {
        queryLogs(condition: $condition) { logs { content } } }";
    let condition = json!({ "queryDuration": ever(), "paging": page() });
    let data = query(oap, QUERY, &json!({ "condition": condition }))?;
    rows(&data, "/queryLogs/logs")?
        .iter()
        .map(|log| {
            let content = log["content"].as_str().unwrap_or_default();
            let entry: Value = serde_json::from_str(content)
                .with_context(|| format!("not an access log in JSON: {content}"))?;
            let path = entry.pointer("/request/path").and_then(Value::as_str);
            Ok(numbered(path.unwrap_or_default())?.1)
        })
        .collect()
}

fn query(oap: SocketAddr, query: &str, variables: &Value) -> Result<Value> {
    let body = json!({ "query": query, "variables": variables }).to_string();
    let answer = http::post_json(oap, "/graphql", &body)?;
    let mut answer: Value = serde_json::from_str(&answer)
        .with_context(|| format!("{oap} does not answer in JSON: {answer}"))?;
    if let Some(errors) = answer.get("errors") {
        bail!("{oap} refuses the query: {errors}");
    }
    Ok(answer["data"].take())
}

fn rows<'a>(data: &'a Value, pointer: &str) -> Result<&'a [Value]> {
    let found = data.pointer(pointer).and_then(Value::as_array);
    Ok(found.with_context(|| format!("no {pointer} in {data}"))?)
}

/// Splits `NAME-NUMBER`.
fn numbered(name: &str) -> Result<(String, u32)> {
    name.rsplit_once('-')
        .and_then(|(service, number)| Some((service.to_owned(), number.parse().ok()?)))
        .with_context(|| format!("{name:?} does not end in a number"))
}

/// A time span that holds every run; OAP looks only where it has data.
fn ever() -> Value {
    json!({ "start": "2020-01-01 000000", "end": "2099-12-31 235959", "step": "SECOND" })
}

fn page() -> Value {
    json!({ "pageNum": 1, "pageSize": ALL_ROWS })
}
