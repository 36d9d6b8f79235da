//! The mappings of the file with their keys, and their values by kind.

use super::{
    error::Result,
    yaml::{Entry, Node, Value, shown},
};

/// Every mapping of the file: where it stands, what messages call it, and the keys it may have.
#[rustfmt::skip]
pub(super) const MAPPINGS: [(&str, &str, &str); 12] = [
    ("", "the file", "services kubernetes mode fail_open_after namespaces"),
    ("services", "a service", "name port address policy backends quota exempt health keepalive move rebalance connect"),
    ("services.backends", "a backend", "address weight"),
    ("services.quota", "`quota`", "per_backend clients connections_per_client headroom min_quota"),
    ("services.keepalive", "`keepalive`", "idle interval probes"),
    ("services.connect", "`connect`", "to endpoints"),
    ("services.connect.endpoints", "an endpoint", "address weight"),
    ("kubernetes", "`kubernetes`", "services publish_every hold_for place"),
    ("kubernetes.services", "a service", "name service selector namespace port match policy quota exempt health keepalive move rebalance"),
    ("kubernetes.services.quota", "`quota`", "per_backend clients connections_per_client pods observed headroom min_quota"),
    ("kubernetes.services.quota.pods", "a class of pods", "selector namespace connections"),
    ("kubernetes.services.keepalive", "`keepalive`", "idle interval probes"),
];

/// The settings of one mapping, all of them known ones.
pub(super) struct Fields<'a> {
    what: &'static str,
    node: &'a Node,
    entries: &'a [Entry],
}

impl<'a> Fields<'a> {
    /// The settings of `node`, the mapping at `path` in [`MAPPINGS`].
    pub(super) fn of(node: &'a Node, path: &'static str) -> Result<Self> {
        let mapping = MAPPINGS.iter().find(|(known, ..)| *known == path);
        let (_, what, keys) = *mapping.unwrap_or(&(path, path, ""));
        let keys: Vec<&str> = keys.split(' ').collect();
        let Value::Map(entries) = &*node.value else {
            return node.fail(format!(
                "{what} must be `key: value` settings, this is {}; the keys are {}",
                node.value.kind(),
                keys.join(", ")
            ));
        };
        if let Some(Entry { key, place, .. }) =
            entries.iter().find(|entry| !keys.contains(&&*entry.key))
        {
            return place.fail(format!(
                "unknown key `{}` in {what}; {}",
                shown(key),
                unknown_key_advice(key, &keys)
            ));
        }
        Ok(Self {
            what,
            node,
            entries,
        })
    }

    /// The first setting that has one of these keys.
    pub(super) fn first(&self, keys: &[&str]) -> Option<&'a Entry> {
        self.entries
            .iter()
            .find(|entry| keys.contains(&&*entry.key))
    }

    /// Refuses the first setting that has one of these keys.
    pub(super) fn none_of(&self, keys: &[&str], why: impl Fn(&str) -> String) -> Result<()> {
        self.first(keys)
            .map_or(Ok(()), |entry| entry.place.fail(why(&entry.key)))
    }

    /// What `read` makes of the value of a key, if it is there.
    pub(super) fn optional<T>(
        &self,
        key: &str,
        read: impl FnOnce(&'a Node) -> Result<T>,
    ) -> Result<Option<T>> {
        self.first(&[key])
            .map(|entry| read(&entry.node))
            .transpose()
    }

    /// What `read` makes of the value of a key, which must be there.
    pub(super) fn required<T>(
        &self,
        key: &str,
        read: impl FnOnce(&'a Node) -> Result<T>,
    ) -> Result<T> {
        let what = self.what;
        self.optional(key, read)?.map_or_else(
            || {
                self.node
                    .fail(format!("`{key}` is missing in {what}; add `{key}: …`"))
            },
            Ok,
        )
    }
}

fn unknown_key_advice(key: &str, known: &[&str]) -> String {
    if key == "<<" {
        return "YAML merge keys are not supported: write the settings out".to_owned();
    }
    let key = key.to_lowercase().replace('-', "_");
    let near = known
        .iter()
        // A longer word can't be a slip, and the distance costs the product of both lengths.
        .filter(|known| key.len() <= 2 * known.len())
        .map(|known| (strsim::levenshtein(&key, known), known))
        // Two changed letters make a transposition.
        .filter(|(distance, known)| *distance <= known.len().div_ceil(3))
        .min();
    let question = near.map_or_else(String::new, |(_, near)| format!("did you mean `{near}`? "));
    format!("{question}the keys are {}", known.join(", "))
}

impl Node {
    /// An error about this value.
    pub(super) fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        self.place.fail(message)
    }

    /// The value of a key of this mapping; the mapping itself where it has no such key.
    pub(super) fn at(&self, key: &str) -> &Self {
        match &*self.value {
            Value::Map(entries) => entries
                .iter()
                .find(|entry| entry.key == key)
                .map_or(self, |entry| &entry.node),
            _ => self,
        }
    }

    /// The items of a list.
    pub(super) fn list(&self, what: &str, example: &str) -> Result<&[Self]> {
        match &*self.value {
            Value::List(items) => Ok(items),
            Value::Null => self.fail(format!(
                "{what} has no value; write a list, for example {example}"
            )),
            other => self.fail(format!(
                "{what} must be a list, this is {}; write {example}",
                other.kind()
            )),
        }
    }

    /// The text of a single value.
    pub(super) fn scalar(&self, what: &str, example: &str) -> Result<&str> {
        match &*self.value {
            Value::Scalar(text) => Ok(text),
            Value::Null => self.fail(format!(
                "{what} is missing here; write a value, for example {example}"
            )),
            other => self.fail(format!(
                "{what} must be a single value, this is {}; write for example {example}",
                other.kind()
            )),
        }
    }

    /// A whole number from `least` to `most`.
    pub(super) fn number(&self, key: &str, least: u32, most: u32, advice: &str) -> Result<u32> {
        let text = self.scalar(key, &least.to_string())?;
        match decimal(text) {
            Some(number) if (least..=most).contains(&number) => Ok(number),
            _ => self.fail(format!(
                "{key} `{}` is not possible; write a whole number from {least} to {most}; {advice}",
                shown(text)
            )),
        }
    }
}

/// A whole number in plain decimal digits: no sign, no separators and no other base, since
/// dialects of YAML disagree on what those mean.
pub(super) fn decimal<T: std::str::FromStr>(text: &str) -> Option<T> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if digits { text.parse().ok() } else { None }
}
