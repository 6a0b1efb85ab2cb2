// Streams one answer with nothing of the project but its .proto files, and prints every event as a JSON line.
// Usage: node stream.mjs PROTOS_DIR HOST:PORT MODEL PROMPT
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [protos, target, model, content] = process.argv.slice(2);
const definition = protoLoader.loadSync("mtp_router/generate/v1/generate_service.proto", {
  includeDirs: [protos, `${protos}/third_party`],
  keepCase: true,
  longs: String,
  enums: String,
  oneofs: true,
});
const { GenerateService } = grpc.loadPackageDefinition(definition).mtp_router.generate.v1;
const client = new GenerateService(target, grpc.credentials.createInsecure());
const call = client.StreamGenerate({
  input: {
    model,
    messages: { messages: [{ role: "ROLE_USER", content }] },
    sampling: { temperature: 0 },
    stop: { max_output_tokens: 16 },
  },
});
call.on("data", (event) => console.log(JSON.stringify(event)));
call.on("error", (error) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
call.on("end", () => client.close());
