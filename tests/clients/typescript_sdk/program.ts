// One whole session with the official TypeScript SDK: what a program for the hosted service would do. Prints what it saw as JSON.
import Anthropic, { NotFoundError, toFile } from '@anthropic-ai/sdk';

const { BASE_URL, API_KEY, SYSTEM, ENVIRONMENT_ID } = process.env as Record<string, string>;
const client = new Anthropic({ baseURL: BASE_URL, apiKey: API_KEY, maxRetries: 0 });
const beta = client.beta;

async function all<T>(items: AsyncIterable<T>): Promise<T[]> {
  const found: T[] = [];
  for await (const item of items) found.push(item);
  return found;
}

const environment = await beta.environments.retrieve(ENVIRONMENT_ID);
const agent = await beta.agents.create({
  name: 'typescript',
  model: 'claude-opus-5',
  system: SYSTEM,
  tools: [{ type: 'agent_toolset_20260401' }],
});
const renamed = await beta.agents.update(agent.id, { version: agent.version, name: 'TypeScript' });
const versions = (await all(beta.agents.versions.list(agent.id))).map((each) => each.version);

const upload = await beta.files.upload({ file: await toFile(Buffer.from('from TypeScript'), 'notes.txt', { type: 'text/plain' }) });
const session = await beta.sessions.create({
  agent: agent.id,
  environment_id: environment.id,
  title: 'typescript',
  metadata: { client: 'node' },
  resources: [{ type: 'file', file_id: upload.id, mount_path: '/notes.txt' }],
});

const streamed: string[] = [];
const said: string[] = [];
const stream = await beta.sessions.events.stream(session.id);
await beta.sessions.events.send(session.id, {
  events: [{ type: 'user.message', content: [{ type: 'text', text: 'go' }] }],
});
for await (const event of stream) {
  streamed.push(event.type);
  if (event.type === 'agent.message' || event.type === 'agent.tool_result') {
    for (const block of event.content ?? []) if (block.type === 'text') said.push(block.text);
  }
  if (event.type === 'session.status_idle') break;
}
const listed = (await all(beta.sessions.events.list(session.id, { limit: 5 }))).map((event) => event.type);
const threads = await all(beta.sessions.threads.list(session.id));

const outputs = await all(beta.files.list({ scope_id: session.id, betas: ['managed-agents-2026-04-01'] }));
const contents = await Promise.all(
  outputs.filter((file) => file.downloadable).map(async (file) => (await beta.files.download(file.id)).text()),
);

let refused = 'nothing';
try {
  await beta.sessions.retrieve('sesn_01unknown');
} catch (error) {
  if (!(error instanceof NotFoundError)) throw error;
  refused = `${error.status} ${error.requestID?.startsWith('req_')}`;
}
const updated = await beta.sessions.update(session.id, { title: null, metadata: { client: null, done: 'yes' } });
const archived = await beta.sessions.archive(session.id);
const deleted = await beta.sessions.delete(session.id);
const still = await all(beta.sessions.list({ agent_id: agent.id, include_archived: true }));

console.log(
  JSON.stringify({
    name: renamed.name,
    versions,
    streamed,
    listed,
    said,
    threads: threads.map((thread) => [thread.status, thread.parent_thread_id]),
    contents,
    refused,
    updated: [updated.title, updated.metadata],
    archived: [archived.status, archived.archived_at !== null],
    deleted: deleted.type,
    still: still.length,
  }),
);
